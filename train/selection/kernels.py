"""The kernels of a run: the formulation of its steps, and the providers that were verified for it.

OUT/kernels.json   formulation, reason and verdicts of a run with --fast-kernels
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dspnet_fast import atomic, verdicts
from dspnet_fast.models import has_fused_formulation
from dspnet_fast.ops import registry
from dspnet_fast.plugins import load as load_plugins
from dspnet_fast.verdicts import FORMULATIONS, POLICIES, Verdict

from ..config import FamilyOptions, PretrainConfig
from ..distributed.process_group import SINGLE_PROCESS, World
from ..pretraining.dspnet import VIEWS
from ..pretraining.trainer import Trainer, random_batch
from ..run.device import check_fast_kernels
from ..teachers.targets import random_targets
from .racer import FEWEST_IMAGES
from .recording import micro_batch_config, shape_of
from .selection import NOTHING_TO_FUSE, Print, Progress, key_of, select, verify_run

KERNELS = "kernels.json"
SELECTION_SECONDS = {"cpu": 60.0, "cuda": 300.0}  # of a selection, roughly; on a GPU it compiles kernels
LEAST_MULTIPLE = 10  # of this time that a run must take to be worth a selection
LEAST_STEPS = 100  # below this number of steps no step is timed to find out
NOT_KNOWN = "on this device nothing is known about the operators"
SHORT = "the run is too short for a race, which dspnet-select makes ahead"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The formulation of a run's steps.

    Attributes:
        formulation: one of FORMULATIONS, or the policy in DSPNET_KERNELS.
        reason: why this formulation.
        verdicts: of every kind of device in the run; empty if nothing was verified.
    """

    formulation: str
    reason: str
    verdicts: tuple[Verdict, ...] = ()

    def verdict(self, key: dict[str, Any]) -> Verdict | None:
        """The verdict with a key, if there is one."""
        return next((verdict for verdict in self.verdicts if verdict.key == key), None)

    def apply(self, key: dict[str, Any]) -> None:
        """Set policy and findings of this process. key: of its device."""
        verdict = self.verdict(key)
        registry.use_findings(verdicts.findings(verdict.operators) if verdict else {})
        registry.set_policy(POLICIES.get(self.formulation, self.formulation))

    def line(self) -> str:
        """A line for the screen."""
        return f"kernels  {self.formulation}: {self.reason}"

    def write(self, out: Path) -> None:
        """Write OUT/kernels.json."""
        values = {
            "formulation": self.formulation,
            "reason": self.reason,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }
        atomic.write_text(out / KERNELS, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, out: Path) -> Kernels | None:
        """The kernels of a run; None if the run has none, with a warning if the file is damaged."""
        path = out / KERNELS
        try:
            values = json.loads(path.read_text())
            found = cls(values["formulation"], values["reason"], tuple(map(Verdict.from_json, values["verdicts"])))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used: %s", path, error)
            return None
        return found if found.formulation in FORMULATIONS else None  # DSPNET_KERNELS is no decision of the run


def choose_kernels(
    config: PretrainConfig,
    steps: int,
    device: torch.device,
    world: World = SINGLE_PROCESS,
    resume: bool = False,
    write: Print = print,
) -> Kernels:
    """Choose and apply the kernels of a run with --fast-kernels. A collective.

    DSPNET_KERNELS decides if it is set. A resumed run keeps its formulation. Otherwise one rank for each kind of device
    takes the cached verdict or, for a long run, verifies and races; a formulation must be good on all of them.

    Args:
        config: configuration of the run.
        steps: number of its steps.
        device: device of this rank.
        world: the process group.
        resume: whether the run in config.out is continued.
        write: prints a line.
    """
    check_fast_kernels(device)
    load_plugins(config.plugins)
    if policy := registry.policy_of_environment():
        kernels = Kernels(policy, "DSPNET_KERNELS is set")
        kernels.apply({})
        return kernels
    key = key_of(device, config.tf32, config.plugins, config.cudnn)
    keys = world.all_gather(key)
    kinds = sorted({keys.index(other) for other in keys})  # the first rank of every kind of device
    rank = _Rank(config, device, world, key, kinds, write)
    saved = world.all_gather(Kernels.read(Path(config.out)) if resume and world.is_main else None)[0]
    kernels = rank.choose(steps) if saved is None else rank.keep(saved)
    kernels.apply(key)
    return kernels


@dataclass(frozen=True)
class _Rank:
    """This rank's part in a choice. `kinds` are the ranks that decide for their kind of device."""

    config: PretrainConfig
    device: torch.device
    world: World
    key: dict[str, Any]
    kinds: Sequence[int]
    write: Print

    def choose(self, steps: int) -> Kernels:
        """The kernels of a new run."""
        if not has_fused_formulation(self.config.network):
            return Kernels("eager", NOTHING_TO_FUSE)
        decides = self.world.rank in self.kinds
        gathered = self.world.all_gather(self._verdict(steps) if decides else None)
        found = [verdict for rank in self.kinds if (verdict := gathered[rank]) is not None]
        if len(found) < len(self.kinds):
            return self._unverified(SHORT)
        return _joint(found)

    def keep(self, saved: Kernels) -> Kernels:
        """The kernels of a resumed run: its own, if they can be used on every rank's device."""
        if saved.formulation == "eager":
            if self.world.rank in self.kinds and saved.verdicts and saved.verdict(self.key) is None:
                self.write(f"kernels: selected elsewhere ({self._change(saved)}); the run stays eager")
            return saved
        if not saved.verdicts:
            known = self._unverified(saved.reason)
            return saved if known.formulation == "fused" else replace(known, reason=f"{NOT_KNOWN}, which the run used")
        old = saved.verdict(self.key)
        decides = self.world.rank in self.kinds
        gathered = self.world.all_gather((old or self._verified_again(saved)) if decides else None)
        found = [gathered[rank] for rank in self.kinds]
        if all(verdict in saved.verdicts for verdict in found):
            return saved
        return _joint(found)

    def _unverified(self, reason: str) -> Kernels:
        """The formulation without verification: fused if it is known to be faster on the devices of all ranks."""
        fused = all(self.world.all_gather(registry.known_to_be_fast(self.device.type, self.config.precision)))
        return Kernels("fused" if fused else "eager", reason)

    def _verdict(self, steps: int) -> Verdict | None:
        """The verdict for this device: cached, new, or None if the run is short."""
        config, size = self.config, self.world.size
        cached = verdicts.read(self.key, shape_of(config, size))
        if cached is not None or self._is_short(steps):
            return cached
        return select(config, self.device, size, write=self.write)

    def _is_short(self, steps: int) -> bool:
        least = LEAST_MULTIPLE * SELECTION_SECONDS[self.device.type]
        return steps < LEAST_STEPS or steps * step_seconds(self.config, self.device, self.world.size) < least

    def _change(self, saved: Kernels) -> str:
        return verdicts.differences(saved.verdicts[0].key, self.key)

    def _verified_again(self, saved: Kernels) -> Verdict:
        """The verdict on a device that the run has not used before: its formulation, if the providers are correct."""
        before, changed = saved.verdicts[0], self._change(saved)
        self.write(f"kernels: selected elsewhere ({changed}); verifying again")
        outcomes = verify_run(self.config, self.device, self.world.size, Progress(self.write))
        good = {operator for (operator, _), reason in verdicts.findings(outcomes).items() if not reason}
        lost = [o for (o, _), reason in verdicts.findings(before.operators).items() if not reason and o not in good]
        reason = f"{before.reason}; verified again after a change: {changed}"
        if lost:
            reason = f"no provider of {', '.join(dict.fromkeys(lost))} was verified after a change: {changed}"
        return replace(
            before,
            date=date.today().isoformat(),
            key=self.key,
            operators=outcomes,
            formulation="eager" if lost else "fused",
            reason=reason,
        )


def _joint(found: Sequence[Verdict]) -> Kernels:
    """The formulation that is good on several kinds of devices."""
    worst = next((verdict for verdict in found if verdict.formulation == "eager"), found[0])
    several = f" ({worst.key['device']})" if len(found) > 1 else ""
    return Kernels(worst.formulation, worst.reason + several, tuple(found))


def step_seconds(config: PretrainConfig, device: torch.device, world_size: int) -> float:
    """Roughly the time of an eager step, from a step of fewer images on a CPU."""
    before = registry.get_policy()
    registry.set_policy("eager")
    try:
        reduced = micro_batch_config(config, world_size, FEWEST_IMAGES if device.type == "cpu" else None)
        seconds = _time_step(replace(reduced, no_cuda_graphs=True), device)
    finally:
        registry.set_policy(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return seconds * config.batch_size / (world_size * reduced.batch_size)


def _time_step(config: PretrainConfig, device: torch.device) -> float:
    trainer = Trainer(config, 1000, device)
    trainer.teacher = random_targets(config, device)
    batch = random_batch(config, VIEWS * config.batch_size)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        losses = trainer.train_step(batch)
        float(next(iter(losses.values())))  # waits for the device
    return time.perf_counter() - began


def use_kernels(
    device: torch.device,
    networks: FamilyOptions,
    image_size: int,
    out: Path | None,
    *,
    tf32: bool,
    plugins: str,
    trains: bool,
) -> None:
    """Apply --fast-kernels to another command than pretraining: it never verifies, and prints its choice.

    Takes the kernels of the run that it continues, or else a cached verdict for the same networks, if they hold here.

    Args:
        device: device of the command.
        networks: network, stem and subnets.
        image_size: height and width of the images, in pixels.
        out: directory of the pretraining run, if there is one.
        tf32, plugins: options of the command, or of the run.
        trains: whether the command computes gradients, in fp32.
    """
    check_fast_kernels(device)
    key = key_of(device, tf32, plugins)
    if policy := registry.policy_of_environment():
        kernels = Kernels(policy, "DSPNET_KERNELS is set")
    elif not has_fused_formulation(networks.network):
        kernels = Kernels("eager", NOTHING_TO_FUSE)
    else:
        shape = {"network": networks.network, "dns": networks.dns, "stem": networks.stem, "image_size": image_size}
        kernels = _existing(key, shape, out, trains) or Kernels(
            "fused" if registry.known_to_be_fast(device.type) else "eager",
            "no verdict for these networks on this device; dspnet-select makes one",
        )
    kernels.apply(key)
    print(kernels.line(), flush=True)


def _existing(key: dict[str, Any], shape: dict[str, Any], out: Path | None, trains: bool) -> Kernels | None:
    own = None if out is None else Kernels.read(out)
    for verdict in (*(own.verdicts if own else ()), *verdicts.read_all()):
        fits = verdict.key == key and shape.items() <= verdict.run.items()
        if fits and not (trains and verdict.run["precision"] != "fp32"):
            return Kernels(verdict.formulation, f"as in pretraining, {verdict.reason}", (verdict,))
    return None
