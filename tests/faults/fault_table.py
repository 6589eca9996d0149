"""The rows of docs/faults.md, and the functions that bring each fault about."""

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
    """fault: its name. messages: patterns of what is printed. code: as a shell sees it. lost: as the document says."""

    fault: str
    messages: list[re.Pattern[str]]
    code: int
    lost: str


def rows() -> list[Row]:
    """All rows of the document's table."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    _, _, *table = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [
        Row(fault, [pattern(shown) for shown in re.findall(r"`([^`]+)`", sees)], int(code), lost)
        for fault, sees, code, lost in table
    ]


def pattern(shown: str) -> re.Pattern[str]:
    """`…` stands for any text within a line and `N` for a number."""
    literal = re.escape(shown).replace(re.escape("…"), ".*")
    return re.compile(re.sub(r"(?<![\w-])N(?!\w)", r"\\d+", literal))


@dataclass
class Outcome:
    """What a fault did.

    Attributes:
        printed: by the command that met the fault.
        code: with which it ended.
        go_on: what its user does then; the run must end by it.
    """

    printed: str
    code: int
    go_on: Callable[[], object] = field(default=lambda: None)


Runner = Callable[["Lab"], Outcome]
RUNNERS: dict[str, Runner] = {}
SLOW: set[str] = set()


def fault(name: str, slow: bool = False) -> Callable[[Runner], Runner]:
    """Runs the row of this name; `slow` ones in `make test-faults` alone."""

    def register(runner: Runner) -> Runner:
        assert name not in RUNNERS, name
        RUNNERS[name] = runner
        if slow:
            SLOW.add(name)
        return runner

    return register
