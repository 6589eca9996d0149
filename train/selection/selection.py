"""Selects the formulation of a run's steps on this device: verifies the providers, then races whole steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from dspnet_fast import verdicts
from dspnet_fast.models import has_fused_formulation
from dspnet_fast.ops import registry
from dspnet_fast.verdicts import Race, Verdict
from dspnet_fast.verification.calls import odd_variants
from dspnet_fast.verification.supervisor import CALL_SECONDS, Outcome, OutOfMemory, verify
from dspnet_fast.workers import Worker

from ..config import PretrainConfig
from ..pretraining.ahead import compile_kernels
from ..run.device import configure_cuda
from . import racer
from .recording import calls_of, micro_batch_config, shape_of

MARGIN = 0.05  # by which fused steps must be faster than eager ones
NOISE = 0.1  # spread of the control from which steps cannot be compared
SPREADS = 3  # multiples of the control's spread by which they must be faster, if this is more
VERIFIED_IMAGES, RACED_IMAGES = 4, 16  # images of a step on a CPU, if the run has more
# Time limits of a selection by one process, and by a rank for which others wait, at most COLLECTIVE_TIMEOUT.
ALONE_SECONDS, RANK_SECONDS = 2400.0, 540.0
VERIFYING_SHARE = 0.75  # of this time, for verification
RACING_SECONDS = {"cpu": 15.0, "cuda": 30.0}  # for the timed steps
FIRST_STEPS_SECONDS = 300.0  # for the first steps of a formulation, which may compile kernels
BUSY = "known without a race, for which the device was too busy"
NOTHING_TO_FUSE = "no convolution of the network is followed by a batch normalisation that could be fused"
PROGRESS_SECONDS = 5.0  # between printed lines

Print = Callable[[str], object]
Outcomes = dict[str, dict[str, Outcome]]


def key_of(device: torch.device, tf32: bool, plugins: str, cudnn: str = "deterministic") -> dict[str, Any]:
    """The key of verdicts on this device, whose settings become those of a run; see `verdicts.key`."""
    if device.type == "cuda":
        configure_cuda(tf32, cudnn)
    return verdicts.key(device, plugins)


def select(
    config: PretrainConfig,
    device: torch.device,
    world_size: int = 1,
    *,
    call_seconds: float = CALL_SECONDS,
    write: Print = print,
) -> Verdict:
    """Verify and race on this device, and keep the verdict in the cache.

    Args:
        config: configuration of the run.
        device: the device.
        world_size: number of ranks of the run.
        call_seconds: time after which an operator's call counts as hanging.
        write: prints a line of progress.
    """
    key, shape = key_of(device, config.tf32, config.plugins, config.cudnn), shape_of(config, world_size)
    progress, deadline = Progress(write), time.monotonic() + _limit(world_size)
    fuses = has_fused_formulation(config.network)
    outcomes = verify_run(config, device, world_size, progress, call_seconds) if fuses else {}
    today, race = date.today().isoformat(), None
    missing = [name for name in registry.CONVOLUTIONS if not any(o.verified for o in outcomes.get(name, {}).values())]
    if config.precision == "fp16":
        formulation, reason = "eager", "fp16 is computed in plain PyTorch only"
    elif not fuses:
        formulation, reason = "eager", NOTHING_TO_FUSE
    elif missing:
        formulation, reason = "eager", f"no provider of {missing[0]} was verified"
    else:
        try:
            race = _race(config, device, world_size, outcomes, deadline, progress)
        except RaceError as error:  # perhaps not again: not kept
            return Verdict(today, key, shape, outcomes, None, "eager", str(error))
        formulation, reason = decide(race)
        if formulation == "eager" and race.spread > NOISE:  # perhaps not again: not kept
            known = registry.known_to_be_fast(device.type, config.precision)
            formulation = "fused" if known else "eager"
            reason = f"{BUSY}: a step took {race.seconds['eager']:.2g} s and, again, {race.control:.2g} s"
            return Verdict(today, key, shape, outcomes, race, formulation, reason)
    verdict = Verdict(today, key, shape, outcomes, race, formulation, reason)
    verdicts.write(verdict)
    return verdict


def verify_run(
    config: PretrainConfig,
    device: torch.device,
    world_size: int,
    progress: Print,
    call_seconds: float = CALL_SECONDS,
) -> Outcomes:
    """Verify all providers on the calls of a run: on a CPU with a few images, on a GPU with all if they fit."""
    if config.precision == "fp16":  # the operators have no fp16
        return {}
    few = micro_batch_config(config, world_size, VERIFIED_IMAGES)
    reduced = few if device.type == "cpu" else micro_batch_config(config, world_size)
    compile_kernels(reduced, device, progress, policy="any")  # for the race too
    progress(f"recording the operators' calls with {reduced.batch_size} images")
    calls = calls_of(few)
    variants = odd_variants(calls)
    while True:
        try:
            return verify(
                [*(calls if reduced == few else calls_of(reduced)), *variants],
                device,
                plugins=config.plugins,
                call_seconds=call_seconds,
                seconds=VERIFYING_SHARE * _limit(world_size),
                progress=progress,
            )
        except OutOfMemory:
            if reduced == few:
                return {}
            reduced = micro_batch_config(config, world_size, reduced.batch_size // 4)


def _limit(world_size: int) -> float:
    return ALONE_SECONDS if world_size == 1 else RANK_SECONDS


def _race(
    config: PretrainConfig,
    device: torch.device,
    world_size: int,
    outcomes: Outcomes,
    deadline: float,
    progress: Print,
) -> Race:
    """Time whole steps in another process; RaceError if that is impossible."""
    job = racer.Job(
        micro_batch_config(config, world_size, RACED_IMAGES if device.type == "cpu" else None),
        verdicts.findings(outcomes),
        RACING_SECONDS[device.type],
    )
    doing = "starting"
    with Worker(racer.__name__, job, device, config.plugins) as worker:
        while True:
            try:
                line = worker.read(min(FIRST_STEPS_SECONDS, deadline - time.monotonic()))
            except TimeoutError:
                raise RaceError(f"the race was ended while {doing}: it took too long") from None
            if line is None:
                raise RaceError(f"the race failed while {doing}: {worker.failure()}")
            if "failed" in line:
                raise RaceError(line["failed"])
            if "result" in line:
                return Race(**line["result"])
            doing = line["doing"]
            progress(f"racing, {doing}")


def decide(race: Race) -> tuple[str, str]:
    """The formulation that a race gives, and the reason."""
    ratio = race.seconds["eager"] / race.seconds["fused"]
    needed = 1 + max(MARGIN, SPREADS * race.spread)
    if ratio > needed:
        return "fused", f"{ratio:.2f} times as fast as eager"
    return "eager", f"fused is {ratio:.2f} times as fast, which is not more than {needed:.2f}"


class RaceError(Exception):
    """The formulations could not be timed."""


class Progress:
    """Prints the current activity, at most every PROGRESS_SECONDS. write: prints a line."""

    def __init__(self, write: Print) -> None:
        self._write = write
        self._began = time.monotonic()
        self._next = self._began

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._write(f"selecting kernels: {line}, {now - self._began:.0f} s")
            self._next = now + PROGRESS_SECONDS
