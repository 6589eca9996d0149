"""Functions shared by all commands: options from dataclasses, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import ActionConfigFile, Namespace
from jsonargparse import DefaultHelpFormatter as JsonHelpFormatter

from dspnet_fast.atomic import is_for_lack_of_room
from dspnet_fast.errors import InputError

from .data.datasets.decoders import gather_warnings
from .distributed.process_group import refuse_ranks
from .run.arguments import ArgumentParser
from .run.interruption import CONTINUES, ctrl_c_again, ctrl_c_kills, ctrl_c_raises
from .run.options import flag, key
from .run.terminal import protect_output

DONE, FAILED, WRONG_INPUT = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT  # as shells report a command that Ctrl-C ended
RECIPES = Path(__file__).parents[1] / "recipes"  # beside train in a checkout and in the installed package
METAVARS = {int: "N", float: "X"}
WIDTH = 120  # of help, at most


class HelpFormatter(argparse.RawDescriptionHelpFormatter, JsonHelpFormatter):
    """Keeps the line breaks of descriptions, and shows defaults but not Python types."""

    def __init__(self, prog: str) -> None:
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        super().__init__(prog, max_help_position=min(30, width // 3), width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Descriptions are written in lines of WIDTH: on a narrower terminal, paragraphs are filled again."""
        if self._width == WIDTH or text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return "\n\n".join("\n".join(self._split_lines(part, width)) for part in text.split("\n\n"))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Lines of an option's help, in which names of options and commands stay whole."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "show this help and exit"
        if action.dest == "print_config":
            return "print all options as YAML and exit"
        is_flag = action.nargs == 0 or not action.option_strings
        if is_flag or action.default in (None, "", argparse.SUPPRESS):
            return action.help or ""
        return f"{action.help} [%(default)s]"


def parser(command: str, description: str, example: str, usage: str = "[options]") -> ArgumentParser:
    """Make the parser of a command.

    Args:
        command: command without the prefix `dspnet-`.
        description: first part of the help.
        example: last part of the help.
        usage: arguments of the usage line.
    """
    recipes = f"\n\nThe folder recipes/ is {RECIPES}" if "recipes/" in example else ""
    made = ArgumentParser(
        prog=f"dspnet-{command}",
        usage=f"dspnet-{command} {usage}",
        description=description,
        epilog=f"examples:\n{example}{recipes}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback if an error occurs")
    return made


def add_config_file(made: ArgumentParser) -> None:
    """Add --config, which reads options from YAML files, and --print_config."""
    made.add_argument(
        "--config", action=ActionConfigFile, metavar="FILE", help="YAML file with options; repeatable, the later wins"
    )


def add_options(made: ArgumentParser, config: type, without: Collection[str] = ()) -> None:
    """Add an option for each field of a dataclass, in groups titled by the docstrings of its base classes.

    Args:
        made: the parser.
        config: a dataclass whose fields are made by `config.option`.
        without: names of fields to skip.
    """
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
                flag(f.name),
                type=hints[f.name] | None if f.default is None else hints[f.name],
                default=f.default,
                help=f.metadata["help"],
                metavar=_metavar(f, hints),
            )


def _metavar(f: Field[Any], hints: Mapping[str, Any]) -> str | None:
    """The placeholder of an option's value; None for argparse's, the option's name in capitals."""
    kinds = {hints[f.name], *get_args(hints[f.name])}
    return f.metadata["metavar"] or next((name for kind, name in METAVARS.items() if kind in kinds), None)


def to_config(config: type, namespace: Namespace) -> Any:
    """Build the dataclass `config` from parsed options."""
    return config(**{f.name: namespace[key(f.name)] for f in fields(config)})


def command(
    main: Callable[[Sequence[str]], None], several_ranks: bool = False, interrupted: str = CONTINUES
) -> Callable[..., None]:
    """The entry point of a command: `run` with this function, called with arguments or, without any, sys.argv[1:]."""
    return partial(run, main, several_ranks=several_ranks, interrupted=interrupted)


def run(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str] | None = None,
    several_ranks: bool = False,
    interrupted: str = CONTINUES,
) -> None:
    """Run a command and exit.

    The exit code is 0 after success, 2 after an `InputError` or a file without permission, 130 after Ctrl-C, and 1
    after any other error. Errors are one line on stderr; with --debug the traceback comes before it. A reader of the
    output that exits does not end the command.

    Args:
        main: function to run, given the arguments.
        argv: arguments [sys.argv[1:]].
        several_ranks: whether `main` shares its work with other processes that torchrun started; else rank 0 refuses.
        interrupted: what Ctrl-C leaves and how to go on, unless the KeyboardInterrupt that ends `main` has a message.
    """
    is_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if is_process:
        ctrl_c_raises()
        sys.unraisablehook = ctrl_c_again
    protect_output()
    gather_warnings()
    try:
        with _full_disk_reported_once():
            if not several_ranks:
                refuse_ranks("this command runs in one process")
            main(argv)
    except KeyboardInterrupt as interrupt:
        if is_process:
            ctrl_c_kills()  # without a traceback, while Python ends
        _fail(f"interrupted; {str(interrupt) or interrupted}", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        if isinstance(error, InputError):
            _fail(str(error), WRONG_INPUT)
        if isinstance(error, PermissionError) and error.filename is not None:
            _fail(f"this user may not use {error.filename}: change its permissions, or give another", WRONG_INPUT)
        reason = str(error).strip().splitlines()
        hint = "" if "--debug" in argv else " (--debug shows the traceback)"
        _fail(f"{type(error).__name__}: {reason[0] if reason else 'no message'}{hint}", FAILED)
    sys.exit(DONE)


@contextmanager
def _full_disk_reported_once() -> Iterator[None]:
    """Hide a thread's traceback of a full disk: TensorBoard's writer thread raises the error in the main thread too."""
    previous = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not is_for_lack_of_room(failure.exc_value):
            previous(failure)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = previous


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
