"""Commands called in the process of a test."""

from types import ModuleType

import pytest


def run(command: ModuleType, *argv: object) -> int:
    """Run a command with these arguments, and return its exit code."""
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in argv])
    assert isinstance(end.value.code, int)
    return end.value.code


def as_arguments(options: dict[str, object]) -> list[str]:
    """Options as on the command line, such as --image-size=12; None leaves one out."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
