"""Trainings that receive a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from train.config import PretrainConfig
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer


@contextmanager
def interrupting(training: type, step: int, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """In this context, a training of a class receives a signal in a step."""
    train_step = training.train_step  # type: ignore[attr-defined]

    def interrupted_step(self: Any, batch: Any) -> Any:
        losses = train_step(self, batch)
        if self.step == step:
            signal.raise_signal(number)
        return losses

    with mock.patch.object(training, "train_step", interrupted_step):
        yield


def stop_after(config: PretrainConfig, step: int, number: signal.Signals = signal.SIGINT) -> BaseException:
    """Start a pretraining that receives a signal in a step; returns the exception that ends it."""
    with interrupting(Trainer, step, number), pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        PretrainRun(config, resume=False).run()
    return ended.value
