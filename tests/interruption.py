"""Trainings that receive a signal."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from train.config import PretrainConfig
from train.pretrain import _main
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer
from train.run import checkpoint


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


def check_resume(configure: Callable[..., PretrainConfig], folder: Path, **options: Any) -> dict[str, Any]:
    """Check that an interrupted and resumed run ends with the bits of an uninterrupted one; returns its checkpoint.

    configure: makes the configuration of a run in `folder / "run"`, or `out`.
    """
    PretrainRun(configure(out=str(folder / "whole"), **options), resume=False).run()
    stop_after(configure(**options), 3)
    _main(["--resume", "--out", str(folder / "run")])
    actual, expected = (checkpoint.load(checkpoint.newest_of_run(folder / name)) for name in ("run", "whole"))
    assert actual.keys() == expected.keys()
    for part in {"model", "momentum", "variance"} & actual.keys():
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)
    return actual
