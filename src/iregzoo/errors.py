"""The one error that a user's input can cause: a line that names the value and the mend."""


class InputError(ValueError):
    """Something about the input or the output place is wrong; the message says what and how to mend it."""
