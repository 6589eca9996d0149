"""The one exception that means: what the user gave cannot be used, and here is what to do about it."""


class InputError(ValueError):
    """Wrong usage or input. Its message, one line, says what is wrong and how to mend it; commands exit with 2."""
