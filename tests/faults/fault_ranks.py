"""One rank of two is gone, or does nothing any more."""

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
SECONDS = 120.0  # within which a job of lost ranks has ended, and this machine has started another

SCRIPT = """
{before}
from train import pretrain

pretrain.main()
"""


def torchrun(folder: Path, argv: list[str], before: str = "") -> subprocess.Popen[str]:
    """Pretraining on two Gloo ranks. before: code that each runs before the command."""
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


def ended(process: subprocess.Popen[str]) -> tuple[str, int]:
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # not killed: then its ranks would outlive it
        printed, _ = process.communicate(timeout=SECONDS)
        raise AssertionError(f"no end within {SECONDS} seconds:\n{printed}") from None
    return printed, process.returncode


def whole_of_ranks(images: Path, folder: Path) -> Path:
    """The directory of a run on two ranks that nothing happened to."""
    folder.mkdir()
    printed, code = ended(torchrun(folder, arguments(data=images, out=folder / "run")))
    assert code == 0, printed
    return folder / "run"


def processes_of(launcher: int) -> dict[int, int]:
    """Process ids of the ranks that a launcher has started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")})
    return found


def resume(lab: Lab) -> None:
    printed, code = ended(torchrun(lab.folder, ["--resume", "--out", str(lab.out)]))
    assert code == 0, printed


def lost(lab: Lab, number: int) -> Outcome:
    """Rank 1 gets this signal between two steps."""
    lab.whole = whole_of_ranks(lab.images, lab.folder / "whole")
    process = torchrun(lab.folder, arguments(data=lab.images, out=lab.out), lab.pausing(STOPPED_AT))
    lab.paused(RANKS)
    os.kill(processes_of(process.pid)[1], number)
    lab.go()
    return Outcome(*ended(process), go_on=lambda: resume(lab))


@fault("one rank of several cannot read an image", slow=True)
def unreadable(lab: Lab) -> Outcome:
    """The other one waits for it in the next step, and cannot save."""
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
    printed, code = ended(process)

    def repair() -> None:
        image.write_bytes(content)
        resume(lab)

    return Outcome(printed, code, repair)


@fault("one rank of several is killed", slow=True)
def killed(lab: Lab) -> Outcome:
    return lost(lab, signal.SIGKILL)


@fault("one rank of several is stopped or hangs", slow=True)
def stopped(lab: Lab) -> Outcome:
    return lost(lab, signal.SIGSTOP)
