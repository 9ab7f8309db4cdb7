"""The one error that a user's input can cause: a line that names the value and the mend; and others in a line."""


class InputError(ValueError):
    """Something about the input or the output place is wrong; the message says what and how to mend it."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a file's name may hold line ends


def in_a_line(error: Exception) -> str:
    """What went wrong, for a list of those that failed: whatever one pair does to PyTorch or ITK, the others go on."""
    if isinstance(error, InputError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[-1][:200]}"


def check_name(name: str) -> None:
    """Refuse the name of a file whose bytes are no UTF-8 text: handed over to ITK, it would end the process.

    Raises:
        InputError: saying what it is.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise InputError(f"{shown}: its name is not UTF-8 text; rename it") from None
