"""What all commands share: options out of a dataclass, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse import DefaultHelpFormatter as JsonHelpFormatter

from dspnet_fast.atomic import is_for_lack_of_room
from dspnet_fast.errors import InputError

from .config import flag, key

DONE, FAILED, WRONG_INPUT = 0, 1, 2
RECIPES = Path(__file__).parents[1] / "recipes"  # beside train in a checkout and in the installed package


class HelpFormatter(argparse.RawDescriptionHelpFormatter, JsonHelpFormatter):
    """Keep the line breaks of descriptions and examples."""


def parser(command: str, description: str, example: str) -> ArgumentParser:
    """A parser whose help ends with an example."""
    recipes = f"\n\nrecipes/ is {RECIPES}" if "recipes/" in example else ""
    made = ArgumentParser(
        prog=f"dspnet-{command}",
        description=description,
        epilog=f"example:\n{example}{recipes}",
        formatter_class=HelpFormatter,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_config_file(made: ArgumentParser) -> None:
    """Let options come from YAML files, and be printed as one."""
    made.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options; may be repeated")


def add_options(made: ArgumentParser, config: type, without: Collection[str] = ()) -> None:
    """One option for each field of a dataclass but those of `without`, grouped by the base class that declares it."""
    assert is_dataclass(config)
    hints = get_type_hints(config)
    declared = {name: base for base in config.__mro__ for name in base.__dict__.get("__annotations__", {})}
    groups: dict[type, Any] = {}
    for f in fields(config):
        if f.name in without:
            continue
        base = declared[f.name]
        if base not in groups:
            groups[base] = made if base is config else made.add_argument_group(base.__doc__)
        if hints[f.name] is bool:
            groups[base].add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
        else:
            groups[base].add_argument(
                flag(f.name), type=hints[f.name], default=f.default, help=f.metadata["help"], metavar="..."
            )


def to_config(config: type, namespace: Namespace) -> Any:
    """The dataclass with the parsed values."""
    return config(**{f.name: namespace[key(f.name)] for f in fields(config)})


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 wrong usage or input, 1 anything else; one-line errors without --debug."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _full_disks_told_once():
            main(argv)
    except KeyboardInterrupt:
        _fail("interrupted", FAILED)
    except BrokenPipeError:
        sys.exit(FAILED)  # the reader of our output has gone; there is nobody to tell
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        if isinstance(error, InputError):
            _fail(str(error), WRONG_INPUT)
        reason = str(error).strip().splitlines()
        hint = "" if "--debug" in argv else " (--debug shows where)"
        _fail(f"{type(error).__name__}: {reason[0] if reason else 'no message'}{hint}", FAILED)
    sys.exit(DONE)


@contextmanager
def _full_disks_told_once() -> Iterator[None]:
    """Leave tracebacks of full disks to who uses the thread: TensorBoard's writer hands its error on as well."""
    before = threading.excepthook

    def tell(failure: threading.ExceptHookArgs) -> None:
        if not is_for_lack_of_room(failure.exc_value):
            before(failure)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
