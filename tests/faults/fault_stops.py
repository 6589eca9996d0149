"""A process is told to stop, or is not asked."""

import random
import signal
import time
from collections.abc import Sequence

from fault_lab import STEPS, Lab, until
from fault_table import Outcome, fault

from train.run import checkpoint

STOPPED_AT = 5

# Before the command: it kills itself in the writing of a checkpoint, the {nth} time that it comes to this point.
KILLED_IN_WRITING = """
import io, os, signal
from pathlib import Path
import torch

left = {nth}

def die(now=True):
    global left
    left -= now
    if now and not left:
        os.kill(os.getpid(), signal.SIGKILL)

save, fsync, replace, unlink = torch.save, os.fsync, os.replace, Path.unlink

def half_saved(contents, file):
    buffer = io.BytesIO()
    save(contents, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    die()
    file.write(buffer.getvalue()[len(buffer.getvalue()) // 2 :])

def before_sync(handle):
    die("step-" in os.readlink("/proc/self/fd/%d" % handle))
    fsync(handle)

def before_rename(source, target):
    die("step-" in str(target))
    replace(source, target)

def after_rename(source, target):
    replace(source, target)
    die("step-" in str(target))

def before_drop(path, **options):
    die(path.name.startswith("step-"))
    unlink(path, **options)

point = {point!r}
if point == "half written": torch.save = half_saved
if point == "before sync": os.fsync = before_sync
if point == "before rename": os.replace = before_rename
if point == "after rename": os.replace = after_rename
if point == "before the old one is dropped": Path.unlink = before_drop
"""
POINTS = ("half written", "before sync", "before rename", "after rename", "before the old one is dropped")


def written(lab: Lab) -> int:
    """When the metrics were last written to. Not how many lines they have: a run that goes on may soon have as many."""
    metrics = lab.seen / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else 0


def killed(lab: Lab, moments: Sequence[str | float]) -> Outcome:
    """Start, kill at the first moment, resume, kill at the second, and so on until a resume sees it through.

    moments: points of the writing of a checkpoint, or seconds of training. No run gets to its end before it is killed.
    """
    printed = ""
    for count, moment in enumerate(moments):
        before = KILLED_IN_WRITING.format(point=moment, nth=2) if isinstance(moment, str) else ""
        known = written(lab)
        process = lab.start(before, pause_at=STEPS - 1, resume=count > 0)
        if not isinstance(moment, str):
            until(lambda last=known: written(lab) != last)  # it trains
            time.sleep(moment)
            process.send(signal.SIGKILL)
        said, code = process.end()
        assert code == 128 + signal.SIGKILL, (moment, said)
        for path in lab.checkpoints.glob("step-*.pt"):
            checkpoint.load(path)  # whole, or not there
        printed += said
    return Outcome(printed + lab.resume(), code)


@fault("`kill -9`, by a person or for lack of memory, at any moment")
def at_any_moment(lab: Lab) -> Outcome:
    return killed(lab, [POINTS[0], POINTS[2], random.uniform(0, 0.1)])


def signalled(lab: Lab, number: int) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    process.send(number)
    lab.go()
    return Outcome(*process.end(), go_on=lab.resume)


@fault("SIGTERM, by which clusters stop a job")
def terminated(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGTERM)


@fault("SIGUSR1, by which clusters give notice")
def given_notice(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGUSR1)


@fault("Ctrl-C")
def interrupted(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGINT)


@fault("a second process takes up a run that is still going")
def taken_up_twice(lab: Lab) -> Outcome:
    first = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    printed, code = lab.start(resume=True).end()
    lab.go()
    said, end = first.end()
    assert end == 0, said
    return Outcome(printed, code)
