"""A process is stopped by a signal, or killed."""

import random
import signal
import time
from collections.abc import Sequence

from fault_lab import STEPS, Lab, until
from fault_table import Outcome, fault

from train.run import checkpoint

STOPPED_AT = 5

# Executed before the command: it kills itself while it writes a checkpoint, the {nth} time that it reaches this point.
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
    """Modification time of the metrics. Their number of lines would not show that a resumed run is training."""
    metrics = lab.seen / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else 0


def killed(lab: Lab, moments: Sequence[str | float]) -> Outcome:
    """Start, kill at the first moment, resume, kill at the second, and so on; then resume to the end.

    moments: points in the writing of a checkpoint, or seconds of training. No run ends before it is killed.
    """
    printed = ""
    for count, moment in enumerate(moments):
        before = KILLED_IN_WRITING.format(point=moment, nth=2) if isinstance(moment, str) else ""
        known = written(lab)
        process = lab.start(before, pause_at=STEPS - 1, resume=count > 0)
        if not isinstance(moment, str):
            until(lambda last=known: written(lab) != last)  # it is training
            time.sleep(moment)
            process.send(signal.SIGKILL)
        output, code = process.end()
        assert code == 128 + signal.SIGKILL, (moment, output)
        for path in lab.checkpoints.glob("step-*.pt"):
            checkpoint.load(path)  # intact
        printed += output
    return Outcome(printed + lab.resume(), code)


@fault("`kill -9` by a user or for lack of memory, at any time")
def killed_at_any_time(lab: Lab) -> Outcome:
    return killed(lab, [POINTS[0], POINTS[2], random.uniform(0, 0.1)])


def signalled(lab: Lab, number: int) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    process.send(number)
    lab.go()
    return Outcome(*process.end(), go_on=lab.resume)


@fault("SIGTERM, sent by clusters to stop a job")
def terminated(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGTERM)


@fault("SIGUSR1, sent by clusters before the time limit")
def notified(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGUSR1)


@fault("SIGHUP, sent when the terminal is closed")
def hung_up(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGHUP)


@fault("Ctrl-C")
def interrupted(lab: Lab) -> Outcome:
    return signalled(lab, signal.SIGINT)


@fault("a run is resumed while another process trains it")
def resumed_twice(lab: Lab) -> Outcome:
    first = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    printed, code = lab.start(resume=True).end()
    lab.go()
    output, end = first.end()
    assert end == 0, output
    return Outcome(printed, code)
