"""Settings that are true or false, counts, or numbers, as command lines hand them over."""

import math
from collections.abc import Sequence
from typing import TypeGuard

from iregzoo.errors import InputError


def flag(value: bool | str, name: str) -> bool:
    """A setting as a bool: ``--name false`` reaches a bundle's config as text, and any text counts as true.

    Raises:
        InputError: for what is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise InputError(f"{name} {value!r}: give true or false")
    return str(value).lower() == "true"


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is a whole number of at least ``least``; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(value: object, name: str, *, least: int = 1, most: int | None = None) -> None:
    """Refuse a setting that is no whole number within its limits.

    Raises:
        InputError: naming it.
    """
    if not is_count(value, least):
        raise InputError(f"{name} {value!r}: give a whole number of at least {least}")
    if most is not None and value > most:
        raise InputError(f"{name} {value}: give at most {most}")


def check_number(value: object, name: str) -> None:
    """Refuse a setting that is no finite number.

    Raises:
        InputError: naming it.
    """
    if not is_number(value):
        raise InputError(f"{name} {value!r}: give a number")


def check_numbers(value: object, name: str, counts: Sequence[int], *, positive: bool = False) -> None:
    """Refuse a setting that is no list of so many finite numbers, above 0 where they are to be ``positive``.

    Raises:
        InputError: naming it.
    """
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if hasattr(value, "tolist"):  # an array, of whatever numbers
        listed = value.tolist()
    if len(listed) not in counts or not all(is_number(each) and (each > 0 or not positive) for each in listed):
        many = " or ".join(map(str, counts))
        raise InputError(f"{name} {value!r}: give a list of {many} numbers{' above 0' if positive else ''}")
