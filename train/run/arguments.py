"""The argument parser of all commands: a wrong argument is an `InputError` of one line that suggests a valid one."""

from __future__ import annotations

import difflib
import re
from typing import Any, NoReturn

import jsonargparse
import yaml

from dspnet_fast.errors import InputError

SURROGATE = "\\uDC"  # start of the escape of a byte that is not UTF-8
UNKNOWN = "unrecognized arguments: "
REQUIRED = "the following arguments are required: "
KINDS = {"<class 'int'>": "a whole number", "<class 'float'>": "a number"}


_load = jsonargparse.get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """As jsonargparse, but with file names that are not UTF-8, which its YAML reader in C refuses."""
    try:
        return _load(text)
    except UnicodeEncodeError:
        return text
    except yaml.YAMLError:
        if SURROGATE not in text:
            raise
        return yaml.safe_load(text)


jsonargparse.set_loader("yaml", _load_yaml, (yaml.YAMLError,))


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser without the usage block of its errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError."""
        parser = getattr(ex, "subcommand_parser", None) or self
        raise InputError(_one_line(message, parser)) from ex


def _one_line(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """An error of jsonargparse as a sentence."""
    text = " ".join(message.split())
    if text.startswith(UNKNOWN):
        return _unknown(text.removeprefix(UNKNOWN).split()[0], parser)
    if text.startswith(REQUIRED):
        names = {action.dest: action.metavar for action in parser._actions if not action.option_strings}
        missing = [str(names.get(name) or name) for name in text.removeprefix(REQUIRED).split(", ")]
        return f"{', '.join(missing)} missing: see {parser.prog} --help"
    if (found := re.search(r"(?:Path is not a file|File does not exist): '([^']*)'", text)) is not None:
        return f"--config {found[1]} is {'a folder' if 'not a file' in text else 'missing'}: give a YAML file"
    if text.startswith("Unexpected config: "):
        return "--config: the file has no options: give YAML with lines such as epochs: 5"
    if (found := re.match(r'Parser key "([^"]+)": (.*)', text)) is not None:
        option, reason = "--" + found[1].split(".")[-1].replace("_", "-"), found[2]
        value = re.search(r"(?:Got|Given) value: (.*)", reason)
        expected = [words for kind, words in KINDS.items() if kind in reason]
        expected += ["auto"] if "Literal['auto']" in reason else []
        return f"{option} {value[1]}: expected {' or '.join(expected)}" if value and expected else f"{option}: {reason}"
    return text


def _unknown(given: str, parser: jsonargparse.ArgumentParser) -> str:
    if not given.startswith("-"):
        return f"{given!r} is one argument too many: see {parser.prog} --help"
    name = given.split("=")[0]
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    meant = [option for option in options if option.startswith(name)] or difflib.get_close_matches(name, options, 1)
    return f"unknown option {name}" + (f": did you mean {meant[0]}?" if meant else f": {parser.prog} --help lists all")
