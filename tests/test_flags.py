"""True and false as text."""

import pytest

from iregzoo.errors import InputError
from iregzoo.flags import flag


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), ("false", False), ("False", False), ("true", True)]
)
def test_text_is_read_as_it_says(value: bool | str, expected: bool) -> None:
    assert flag(value, "amp") is expected


@pytest.mark.parametrize("value", ["no", "", "0"])
def test_other_text_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=rf"overwrite '{value}': give true or false"):
        flag(value, "overwrite")
