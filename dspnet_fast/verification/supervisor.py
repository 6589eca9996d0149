"""The process that verifies providers: starts workers, limits their time, and collects the outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops import registry
from ..workers import Worker
from .calls import Call, Layout
from .worker import Case

START_SECONDS = 180.0  # until a worker has imported PyTorch
CALL_SECONDS = 60.0  # for one call, with the compilation of its kernel


class OutOfMemory(Exception):
    """The device has too little memory for the reference results of a call."""


@dataclass(frozen=True)
class Outcome:
    """What was found about one provider of one operator.

    Attributes:
        verified: whether it may be used.
        reason: why not.
        calls: number of calls that it passed.
        error: largest error as a share of its bound.
    """

    verified: bool
    reason: str = ""
    calls: int = 0
    error: float = 0.0


class _Findings:
    """Outcomes of cases so far."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = dict(enumerate(cases))
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        self._declined: dict[tuple[str, str], str] = {}

    def outcome(self, case: Case) -> Outcome:
        declined = self._declined.get(case.pair)
        return self._outcomes.get(case.pair, Outcome(False, f"it accepts none of the calls: {declined}"))

    def add(self, line: dict[str, Any]) -> None:
        """Add a worker's line about a case that is done."""
        case = self.cases[line["done"]]
        if "declined" in line:
            self._declined[case.pair] = line["declined"]
        elif line["problem"]:
            self.refuse(case, line["problem"])
        else:
            before = self._outcomes.get(case.pair, Outcome(True))
            self._outcomes[case.pair] = Outcome(True, "", before.calls + 1, max(before.error, line["error"]))

    def refuse(self, case: Case, problem: str) -> None:
        before = self._outcomes.get(case.pair, Outcome(True))
        self._outcomes[case.pair] = replace(before, verified=False, reason=f"{problem} ({case.call.describe()})")

    def refuse_rest(self, after: int, reason: str) -> None:
        """Refuse the providers that have cases after a number."""
        for case in self.remaining(after).values():
            before = self._outcomes.get(case.pair, Outcome(True))
            self._outcomes[case.pair] = replace(before, verified=False, reason=reason)

    def remaining(self, after: int) -> dict[int, Case]:
        """Cases after a number, without those of refused providers."""
        refused = {pair for pair, outcome in self._outcomes.items() if not outcome.verified}
        return {n: case for n, case in self.cases.items() if n > after and case.pair not in refused}

    def all(self) -> dict[str, dict[str, Outcome]]:
        found: dict[str, dict[str, Outcome]] = {}
        for case in self.cases.values():
            found.setdefault(case.call.operator, {})[case.provider] = self.outcome(case)
        return found


def verify(
    calls: Sequence[Call],
    device: torch.device,
    *,
    plugins: str = "",
    call_seconds: float = CALL_SECONDS,
    seconds: float = float("inf"),
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, dict[str, Outcome]]:
    """Verify the providers that can run on a device.

    Args:
        calls: the calls, see `record`.
        device: device to verify on.
        plugins: modules that register providers, see `dspnet_fast.plugins.load`.
        call_seconds: time limit of one call.
        seconds: time limit of all.
        progress: receives a line about what is done now.

    Returns:
        {operator: {provider: outcome}} for operators with such providers.

    Raises:
        OutOfMemory: if the device has too little memory for one of the calls.
    """
    findings = _Findings(_cases(calls, device.type))
    deadline = time.monotonic() + seconds
    remaining = findings.cases
    while remaining:
        with Worker("dspnet_fast.verification.worker", remaining, device, plugins) as worker:
            last = _follow(worker, findings, remaining, call_seconds, deadline, progress)
        remaining = findings.remaining(last)
    return findings.all()


def _cases(calls: Iterable[Call], device: str) -> list[Case]:
    """The cases of all calls, those of one operator next to each other."""
    cases = []
    for call in sorted(calls, key=lambda call: call.operator):
        flags = any(isinstance(part, Layout) and part.dtype == torch.bool for part in call.arguments)
        for seed in (0, 1) if flags else (0,):
            cases += [Case(call, seed, provider.name) for provider in registry.available(call.operator, device)]
    return cases


def _follow(
    worker: Worker,
    findings: _Findings,
    cases: dict[int, Case],
    call_seconds: float,
    deadline: float,
    progress: Callable[[str], object],
) -> int:
    """Follow a worker to its end; returns the number of the last case that needs no other worker."""
    done, last = min(cases) - 1, max(cases)
    current, limit = None, START_SECONDS
    while True:
        ended = ""
        try:
            line = worker.read(min(limit, deadline - time.monotonic()))
        except TimeoutError:
            line, ended = None, f"no result within {limit:g} s"
        if line is None:
            ended = ended or worker.failure()
            if time.monotonic() >= deadline:
                findings.refuse_rest(done, "not verified within the time limit")
            elif current is None:
                findings.refuse_rest(done, f"the verifying process failed: {ended}")
            else:
                findings.refuse(cases[current], ended)
                return current
            return last
        limit = call_seconds
        if "stopped" in line:
            return line["stopped"]
        if "out_of_memory" in line:
            raise OutOfMemory
        if "begins" in line:
            current = line["begins"]
            case = cases[current]
            progress(f"verifying {case.call.operator} by {case.provider}, call {current + 1} of {len(findings.cases)}")
        elif "done" in line:
            done, current = line["done"], None
            findings.add(line)
