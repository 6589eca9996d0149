"""The exception for invalid input."""


class InputError(ValueError):
    """Invalid arguments or input. Its message, one line, states the problem and the remedy; commands exit with 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the type of an error without a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
