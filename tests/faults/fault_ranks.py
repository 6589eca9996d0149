"""One of two ranks is killed, stopped, or cannot read an image."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from fault_lab import ENVIRONMENT, ROOT, Lab, arguments
from fault_table import Outcome, fault

from train.config import PretrainConfig
from train.data.sampler import EpochSampler
from train.run.saved_config import read_config

RANKS = 2
STOPPED_AT = 5
TIMEOUT = 120.0  # seconds, for a job to end after a lost rank

SCRIPT = """
{before}
from train import pretrain

pretrain.main()
"""


def torchrun(folder: Path, argv: list[str], before: str = "") -> subprocess.Popen[str]:
    """Start pretraining on two Gloo ranks. before: code that each rank executes before the command."""
    script = folder / "rank.py"
    script.write_text(SCRIPT.format(before=before))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return subprocess.Popen(
        [*launcher, str(script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )


def wait_for(process: subprocess.Popen[str]) -> tuple[str, int]:
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # killing it would leave its ranks running
        printed, _ = process.communicate(timeout=TIMEOUT)
        raise AssertionError(f"no end within {TIMEOUT} seconds:\n{printed}") from None
    return printed, process.returncode


def whole_of_ranks(images: Path, folder: Path) -> Path:
    """The directory of a run on two ranks without faults."""
    folder.mkdir()
    printed, code = wait_for(torchrun(folder, arguments(data=images, out=folder / "run")))
    assert code == 0, printed
    return folder / "run"


def processes_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's ranks by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")})
    return found


def resume(lab: Lab) -> None:
    printed, code = wait_for(torchrun(lab.folder, ["--resume", "--out", str(lab.out)]))
    assert code == 0, printed


def signal_rank(lab: Lab, number: int) -> Outcome:
    """Send a signal to rank 1 between two steps."""
    lab.whole = whole_of_ranks(lab.images, lab.folder / "whole")
    process = torchrun(lab.folder, arguments(data=lab.images, out=lab.out), lab.pausing(STOPPED_AT))
    lab.paused(RANKS)
    os.kill(processes_of(process.pid)[1], number)
    lab.go()
    return Outcome(*wait_for(process), go_on=lambda: resume(lab))


@fault("one of several ranks cannot read an image, above the limit `--max-bad-images`", slow=True)
def unreadable(lab: Lab) -> Outcome:
    """The other rank waits in the next step and cannot save."""
    lab.whole = whole_of_ranks(lab.images, lab.folder / "whole")
    process = torchrun(lab.folder, arguments(data=lab.images, out=lab.out), lab.pausing(STOPPED_AT))
    lab.paused(RANKS)
    config = read_config(lab.seen, PretrainConfig)
    images = sorted(lab.images.iterdir())
    share = {"rank": 1, "world_size": RANKS}
    order = EpochSampler(len(images), config.batch_size, config.seed, config.epochs, STOPPED_AT + 1, **share)
    image = images[next(iter(order))[0][1]]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    lab.go()
    printed, code = wait_for(process)

    def repair() -> None:
        image.write_bytes(content)
        resume(lab)

    return Outcome(printed, code, repair)


@fault("one of several ranks is killed", slow=True)
def killed(lab: Lab) -> Outcome:
    return signal_rank(lab, signal.SIGKILL)


@fault("one of several ranks is suspended (SIGSTOP)", slow=True)
def stopped(lab: Lab) -> Outcome:
    return signal_rank(lab, signal.SIGSTOP)
