"""Settings that are true or false, as MONAI's command line hands them over."""

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
