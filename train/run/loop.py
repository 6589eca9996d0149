"""The training loop of every command: steps, and between them events, until the end or a request to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dspnet_fast.errors import InputError
from dspnet_fast.weight_file import load_state

from ..distributed.process_group import SINGLE_PROCESS
from ..distributed.watchdog import Watchdog
from . import checkpoint
from .interruption import Interruption
from .progress import Monitor
from .thread_waiting import ThreadWaiting
from .update_guard import UpdateGuard

SAVE_SECONDS = 60.0  # between checkpoints: the most work that a crash costs
LOSS_STEPS = 20  # steps between losses on the screen: reading one waits for the device

Batch = TypeVar("Batch", contravariant=True)
Losses = TypeVar("Losses")
Losses_co = TypeVar("Losses_co", covariant=True)


class Training(Protocol[Batch, Losses_co]):
    """A training of which `step` of `steps` are done."""

    step: int
    steps: int

    def train_step(self, batch: Batch) -> Losses_co:
        """One step; returns its loss or losses."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that the following steps depend on: tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        ...


@dataclass
class Event(Generic[Losses]):
    """An action between steps.

    Attributes:
        action: called with the losses of the step.
        steps: period in steps; 0 for never but at the end.
        seconds: period in seconds, besides.
        at_end: whether to act after the last step too.
    """

    action: Callable[[Losses], object]
    steps: int = 0
    seconds: float = float("inf")
    at_end: bool = True
    _since: float = field(default_factory=time.monotonic, repr=False)

    def run(self, step: int, losses: Losses, last: bool) -> None:
        """Act if it is time to."""
        due = (self.steps and step % self.steps == 0) or time.monotonic() - self._since > self.seconds
        if self.at_end if last else due:
            self.action(losses)
            self._since = time.monotonic()


def train(
    training: Training[Batch, Losses],
    batches: Iterable[Batch],
    events: Sequence[Event[Losses]],
    interruption: Interruption,
    monitor: Monitor,
    save_and_stop: Callable[[], object],
    stop_requested: Callable[[bool], bool] = bool,
) -> None:
    """Train to the end of the batches.

    Args:
        training: the training, at the step where the batches begin.
        batches: one for each step that is left.
        events: actions between steps, in this order.
        interruption: entered; holds requests to stop.
        monitor: entered; shows the progress.
        save_and_stop: called before `Interruption.stop` ends the program.
        stop_requested: given whether this process was asked to stop, whether the loop should.
    """
    with ThreadWaiting() as waiting:
        for batch in batches:
            losses = training.train_step(batch)
            monitor.advance()
            waiting.after_step()
            last = training.step == training.steps
            for event in events:
                event.run(training.step, losses, last)
            if not last and stop_requested(interruption.requested):
                save_and_stop()
                interruption.stop()


class SingleModelTraining:
    """The state of a training of one model with one optimizer."""

    model: nn.Module
    step: int
    _optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        load_state(self.model, state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def resume(training: Training[Any, Any], folder: Path, device: torch.device) -> None:
    """Load the newest readable checkpoint in `folder`, if there is one."""
    checkpoint.remove_leftovers(folder)
    state = checkpoint.load_newest(folder, device, print)
    if state is not None:
        training.load_state(state)


def run(
    name: str,
    training: Training[Batch, Tensor],
    batches: Callable[[int], Iterable[Batch]],
    folder: Path,
    device: torch.device,
    log: Callable[[int, float], None] | None = None,
    measure: Callable[[], str] | None = None,
    measure_steps: int = 0,
    guards: Sequence[UpdateGuard] = (),
    stall_timeout: float = 300.0,
) -> None:
    """Train with a progress bar and checkpoints, from the newest checkpoint if the training has not begun.

    Args:
        name: name of the work on the screen.
        training: the training, before its first step or resumed.
        batches: the batches from a step on.
        folder: folder for the checkpoints of this training alone.
        device: device of the training's state.
        log: called with a step and its loss, every LOSS_STEPS steps.
        measure: called every `measure_steps` steps, except at the end; returns text to show.
        guards: those of the training, whose messages are shown.
        stall_timeout: seconds without a step before a stall is reported; 0: never.

    Raises:
        InputError: after saving, if a step or a batch cannot be computed.
        KeyboardInterrupt or SystemExit after saving, if a signal asked to stop.
    """
    if training.step == 0:
        resume(training, folder, device)
    if training.step == training.steps:
        return
    with (
        Interruption() as interruption,
        Monitor(name, training.steps, training.step) as monitor,
        Watchdog(SINGLE_PROCESS, stall_timeout, folder.parent / "stalled.txt", monitor.line) as watchdog,
    ):

        def watched() -> Iterator[Batch]:
            watchdog.at(training.step, "waiting for images")
            for batch in batches(training.step):
                watchdog.at(training.step, "training")
                yield batch
                watchdog.at(training.step, "waiting for images")

        def show_skipped(loss: Tensor | None = None) -> None:
            for guard in guards:
                for line in guard.new_messages():
                    monitor.line(line)

        def show(loss: Tensor) -> None:
            value = loss.item()
            monitor.status(f"loss {value:.3f}")
            if log is not None and math.isfinite(value):
                log(training.step, value)

        def show_measured(loss: Tensor) -> None:
            assert measure is not None
            with monitor.paused(), watchdog.paused():
                text = measure()
            monitor.line(f"step {training.step}  {text}")

        def save(loss: Tensor | None = None) -> None:
            watchdog.at(training.step, "writing a checkpoint")
            checkpoint.save(folder, training.step, training.state())

        def save_and_stop() -> None:
            save()
            monitor.line(f"stopped and saved after step {training.step} of {training.steps}")

        events: list[Event[Tensor]] = [Event(show_skipped, 1), Event(show, LOSS_STEPS)]
        if measure is not None:
            events.append(Event(show_measured, measure_steps, at_end=False))
        events.append(Event(save, seconds=SAVE_SECONDS))
        try:
            train(training, watched(), events, interruption, monitor, save_and_stop)
        except InputError:
            show_skipped()
            save()
            raise
