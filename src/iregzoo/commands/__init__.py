"""The commands of ``iregzoo``. Each one's help is its docstring.

Each imports what it needs itself: PyTorch takes seconds to import, and ``iregzoo list`` needs none of it.
"""
