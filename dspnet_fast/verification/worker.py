"""The process that checks calls: `python -m dspnet_fast.verification.worker`, started by the supervisor.

It reports before and after every case, so that the supervisor knows which call ended or blocked it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops import registry
from ..workers import receive
from .calls import Call
from .check import Reference, check, leaks

FURTHER_DRAWS = 2  # of random arguments, with which an error beyond its bound must occur again


@dataclass(frozen=True)
class Case:
    """A call of an operator, the seed of its random arguments, and the provider to check."""

    call: Call
    seed: int
    provider: str

    @property
    def pair(self) -> tuple[str, str]:
        """Operator and provider."""
        return self.call.operator, self.provider


@torch.no_grad()
def main() -> None:
    """Check cases, by number, until the first failure of each provider, on a GPU until the first exception."""
    cases, device, report = receive()
    registry.set_policy("native")  # references are native bodies all through, whatever DSPNET_KERNELS is
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the references of small tensors are faster without threads
    for case in cases.values():
        registry.operators[case.call.operator].providers[case.provider].supported()  # loads the compiled library
    try:
        _warm_up(next(iter(cases.values())), device)
        report(ready=True)
        _check_all(cases, device, threads, report)
    except torch.OutOfMemoryError:
        report(out_of_memory=True)


def _check_all(cases: dict[int, Case], device: torch.device, threads: int, report: Callable[..., None]) -> None:
    refused: set[tuple[str, str]] = set()
    tested: set[tuple[str, str]] = set()  # for leaks
    reference: Reference | None = None
    for number, case in cases.items():
        if case.pair in refused:
            continue
        report(begins=number)
        provider = registry.operators[case.call.operator].providers[case.provider]
        if reference is None or (reference.call, reference.seed) != (case.call, case.seed):
            reference = None  # frees its memory
            reference = Reference.of(case.call, device, case.seed)
        accepted, declined = provider.accepts(*[reference.arguments[place] for place in provider.places])
        if not accepted:
            report(done=number, declined=declined)
            continue
        try:
            provider = replace(provider, run=_with_threads(threads, provider.run))
            problem, error = check(provider, reference)
            for draw in range(FURTHER_DRAWS):
                if error > 1:  # perhaps by chance
                    seed = case.seed + 2 * (draw + 1)
                    problem, error = check(provider, Reference.of(case.call, device, seed))
            if not problem and case.pair not in tested:
                problem = leaks(provider, reference)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            message = next(iter(str(failure).strip().splitlines()), "no message")
            report(done=number, problem=f"it raised {type(failure).__name__}: {message}", error=0.0)
            if device.type == "cuda":  # an illegal access makes everything fail that follows in this process
                report(stopped=number)
                return
            refused.add(case.pair)
            continue
        tested.add(case.pair)
        if problem:
            refused.add(case.pair)
        report(done=number, problem=problem, error=error)
    report(stopped=max(cases))


def _warm_up(case: Case, device: torch.device) -> None:
    """Check the native body on a call: what the first check imports and initialises takes seconds."""
    operator = registry.operators[case.call.operator]
    native = replace(operator.providers[case.provider], run=operator.native)
    check(native, Reference.of(case.call, device, case.seed))
    gc.collect()
    gc.freeze()  # makes the collections cheap that precede measurements of memory


def _with_threads(threads: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        torch.set_num_threads(threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(1)

    return run


if __name__ == "__main__":
    main()
