"""The exception for invalid input."""


class InputError(ValueError):
    """Invalid arguments or input. Its message, one line, states the problem and the remedy; commands exit with 2."""
