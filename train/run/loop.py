"""Steps from wherever a training was stopped to its end: progress, checkpoints, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from . import checkpoint
from .interruption import Interruption
from .progress import Monitor

SAVE_SECONDS = 60.0  # of work that a crash may cost
SHOWN_STEPS = 20  # steps between losses on the screen: reading one waits for the device

Batch = TypeVar("Batch", contravariant=True)


class Training(Protocol[Batch]):
    """What can be run: `step` of `steps` are done, and `state` is all that the rest depends on."""

    step: int
    steps: int

    def train_step(self, batch: Batch) -> Tensor:
        """One step; returns its loss, a scalar."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


class OfOneModel:
    """What a `Training` of one model by one optimizer saves."""

    model: nn.Module
    step: int
    _optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def resume(training: Training[Any], folder: Path, device: torch.device) -> None:
    """Bring a training to the newest checkpoint in `folder` that can be read, if there is one."""
    checkpoint.clear_rests(folder)
    state = checkpoint.load_newest(folder, device, print)
    if state is not None:
        training.load_state(state)


def run(
    what: str,
    training: Training[Batch],
    batches: Callable[[int], Iterable[Batch]],
    folder: Path,
    device: torch.device,
    log: Callable[[int, float], None] | None = None,
    measure: Callable[[], str] | None = None,
    measure_steps: int = 0,
) -> None:
    """Train to the end, from where it is, or from the newest checkpoint if it has not begun; Interruption.stop() after
    saving.

    Args:
        what: a word for it, on the screen.
        training: as it is before its first step, or resumed.
        batches: the batches from a step on.
        folder: of checkpoints, of this training alone.
        device: where its state belongs.
        log: told the step and its loss, now and then.
        measure: called every `measure_steps` steps if they are not 0, but not at the end; says what it found.
    """
    if training.step == 0:
        resume(training, folder, device)
    if training.step == training.steps:
        return
    with Interruption() as interruption, Monitor(what, training.steps, training.step) as monitor:
        saved = time.monotonic()
        for batch in batches(training.step):
            loss = training.train_step(batch)
            last = training.step == training.steps
            monitor.advance()
            if last or training.step % SHOWN_STEPS == 0:
                value = loss.item()
                monitor.status(f"loss {value:.3f}")
                if log is not None:
                    log(training.step, value)
            if measure is not None and measure_steps and training.step % measure_steps == 0 and not last:
                with monitor.paused():
                    found = measure()
                monitor.line(f"step {training.step}  {found}")
            if last or interruption.requested or time.monotonic() - saved > SAVE_SECONDS:
                checkpoint.save(folder, training.step, training.state())
                saved = time.monotonic()
            if interruption.requested and not last:
                monitor.line(f"stopped and saved after step {training.step} of {training.steps}")
                interruption.stop()
