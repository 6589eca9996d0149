"""The rows of docs/faults.md, and the functions that produce the faults."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fault_lab import Lab

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "faults.md"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        fault: its name.
        messages: patterns of the printed messages.
        code: exit code as in a shell.
        lost: the last column.
    """

    fault: str
    messages: list[re.Pattern[str]]
    code: int
    lost: str


def rows() -> list[Row]:
    """All rows of the document's table."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    _, _, *table = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [
        Row(fault, [pattern(shown) for shown in re.findall(r"`([^`]+)`", printed)], int(code), lost)
        for fault, printed, code, lost in table
    ]


def pattern(shown: str) -> re.Pattern[str]:
    """Convert a message to a pattern: `…` stands for any text within a line and `N` for a number."""
    literal = re.escape(shown).replace(re.escape("…"), ".*")
    return re.compile(re.sub(r"(?<![\w-])N(?!\w)", r"\\d+", literal))


@dataclass
class Outcome:
    """The result of a fault.

    Attributes:
        printed: output of the command.
        code: its exit code.
        go_on: repairs the fault and finishes the run, as a user would.
    """

    printed: str
    code: int
    go_on: Callable[[], object] = field(default=lambda: None)


Runner = Callable[["Lab"], Outcome]
RUNNERS: dict[str, Runner] = {}
SLOW: set[str] = set()


def fault(name: str, slow: bool = False) -> Callable[[Runner], Runner]:
    """Register the function that produces a fault; `slow` ones run in `make test-faults` only."""

    def register(runner: Runner) -> Runner:
        assert name not in RUNNERS, name
        RUNNERS[name] = runner
        if slow:
            SLOW.add(name)
        return runner

    return register
