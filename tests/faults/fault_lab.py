"""Tiny pretraining runs in which the tests produce faults, and their comparison with a run without faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.commands import as_arguments
from tests.small_run import SMALL_RUN
from train.run import checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TIMEOUT = 90.0  # seconds

STEPS = 20
TINY = SMALL_RUN | {
    "dns": "c8-d1111,c8-d1121",
    "batch_size": 4,  # of 40 images
    "subnets_per_step": 2,
    "probe_epochs": 0,
    "checkpoint_epochs": 0.3,  # every 3 steps
}

# Executed before the command: after this step a rank creates one file, and continues when another exists.
PAUSE = """
import os, time
from pathlib import Path
from train.pretraining.trainer import Trainer

train_step = Trainer.train_step

def pausing(self, *args, **kwargs):
    result = train_step(self, *args, **kwargs)
    if self.step == {step}:
        Path({here!r} + os.environ.get("RANK", "0")).touch()
        deadline = time.monotonic() + {timeout}
        while not Path({go!r}).exists():
            if time.monotonic() > deadline:
                raise SystemExit("timeout while paused")
            time.sleep(0.005)
    return result

Trainer.train_step = pausing
"""


def arguments(**options: object) -> list[str]:
    return as_arguments({**TINY, **options})


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.005)


class Process:
    """A command started by a fork server. printed: the file with its output."""

    def __init__(self, fork_server: ForkServer, pid: int, printed: Path) -> None:
        self.pid = pid
        self.printed = printed
        self._fork_server = fork_server

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[str, int]:
        """Wait for its end; return its output and its exit code as in a shell."""
        alarm = threading.Timer(TIMEOUT, self.send, [signal.SIGKILL])
        alarm.start()
        code = self._fork_server.ask(wait=self.pid)
        alarm.cancel()
        return self.printed.read_text(), code if code >= 0 else 128 - code


class ForkServer:
    """Forks pretraining processes (fork_server.py). prefix: a command that executes the server."""

    def __init__(self, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
        )
        self.pid = self._process.pid

    def ask(self, **request: object) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has died: see its output"
        return int(answer)

    def start(self, argv: Sequence[str], before: str, printed: Path) -> Process:
        return Process(self, self.ask(argv=list(argv), before=before, printed=str(printed)), printed)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=TIMEOUT)


class Lab:
    """A run and its reference.

    Attributes:
        images: the dataset.
        out: the run directory for the commands.
        seen: the run directory for the test, another path if the commands run in a mount namespace.
        whole: the directory of a run without faults.
        folder: for all files of the test.
    """

    def __init__(self, fork_server: ForkServer, images: Path, whole: Path, folder: Path) -> None:
        self.fork_server = fork_server
        self.images = images
        self.whole = whole
        self.folder = folder
        self.out = self.seen = folder / "run"
        self._started = 0

    def start(self, before: str = "", pause_at: int | None = None, resume: bool = False, **options: object) -> Process:
        """Start a run, or with `resume` continue it; after the step `pause_at` it waits for `go`."""
        self._started += 1
        if pause_at is not None:
            before = self.pausing(pause_at) + before
        options = {"out": self.out, **options}
        argv = (
            ["--resume", *as_arguments(options)]
            if resume
            else ["--fast-kernels", *arguments(**{"data": self.images, **options})]
        )
        return self.fork_server.start(argv, before, self.folder / f"printed{self._started}")

    def pausing(self, step: int) -> str:
        return PAUSE.format(timeout=TIMEOUT, step=step, here=str(self.folder / "paused"), go=str(self.folder / "go"))

    def paused(self, ranks: int = 1) -> None:
        """Wait until all ranks have paused."""
        until(lambda: all((self.folder / f"paused{rank}").exists() for rank in range(ranks)))

    def go(self) -> None:
        (self.folder / "go").touch()

    def run(self, **options: object) -> str:
        """Start as `start`, and wait for its successful end."""
        printed, code = self.start(**options).end()  # type: ignore[arg-type]
        assert code == 0, printed
        return printed

    def resume(self, **options: object) -> str:
        return self.run(resume=True, **options)

    @property
    def checkpoints(self) -> Path:
        return self.seen / "checkpoints"


def losses(out: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and losses of the lines of the metrics; an incomplete line of a killed process is skipped."""
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            found.append((entry["step"], entry["loss"]))
    return found


def assert_same_run(out: Path, whole: Path) -> None:
    """Assert equal bits of weights, statistics and momentum, and metrics with the same losses, every step once."""
    actual, expected = (checkpoint.load(checkpoint.newest_of_run(run)) for run in (out, whole))
    assert actual["step"] == expected["step"]
    for part in ("model", "momentum"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)
    assert losses(out) == losses(whole)
    assert not list((out / "checkpoints").glob(".*")), "an incomplete file was left"


def assert_finished(out: Path, steps: int = STEPS) -> None:
    """Assert that the metrics have every step once and that all weights are finite."""
    state = checkpoint.load(checkpoint.newest_of_run(out))
    assert state["step"] == steps
    assert all(value.isfinite().all() for part in ("model", "momentum") for value in state[part].values())
    assert [step for step, _ in losses(out)] == list(range(1, steps + 1))
