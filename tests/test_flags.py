"""True and false as text."""

import pytest

from iregzoo.errors import InputError
from iregzoo.flags import check_count, check_numbers, flag


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), ("false", False), ("False", False), ("true", True)]
)
def test_text_is_read_as_it_says(value: bool | str, expected: bool) -> None:
    assert flag(value, "amp") is expected


@pytest.mark.parametrize("value", ["no", "", "0"])
def test_other_text_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=rf"overwrite '{value}': give true or false"):
        flag(value, "overwrite")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "two", None])
def test_what_is_no_count_is_refused(value: object) -> None:
    check_count(1, "workers")
    with pytest.raises(InputError, match=f"workers {value!r}: give a whole number of at least 1"):
        check_count(value, "workers")
    check_count(0, "refine", least=0, most=5)
    with pytest.raises(InputError, match="refine 6: give at most 5"):
        check_count(6, "refine", least=0, most=5)


@pytest.mark.parametrize(
    "value", [1, "1,1,1", [1.0, 1.0], [1, 1, 1, 1], [1, 1, 0], [1, 1, -2.0], [1, 1, float("nan")], None]
)
def test_what_is_no_list_of_sizes_is_refused(value: object) -> None:
    check_numbers([1, 1.5, 2], "spacing", (3,), positive=True)
    check_numbers((-1000, 200), "intensity_window", (2,))
    with pytest.raises(InputError, match=r"spacing .*: give a list of 3 numbers above 0"):
        check_numbers(value, "spacing", (3,), positive=True)
    with pytest.raises(InputError, match=r"spacing 'a': give a list of 1 or 2 numbers$"):
        check_numbers("a", "spacing", (1, 2))
