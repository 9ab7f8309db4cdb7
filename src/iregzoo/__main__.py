"""``python -m iregzoo`` is ``iregzoo``."""

from iregzoo.cli import main

main()
