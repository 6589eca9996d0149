"""Notices that a run has stopped moving: this process by itself, or another rank of the job."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from .ranks import Ranks

BEAT = 2.0  # seconds between two heartbeats
SILENCE = 20.0  # seconds without one, after which a rank is given up; torchrun then takes up to 30 to end the others
LOST = 70  # exit code of a rank that gave another one up
FINISHED = "finished"


class Heartbeat(NamedTuple):
    """What a rank tells about itself: a number that grows, where it runs, and what it does."""

    beats: int
    host: str
    pid: int
    step: int
    doing: str


class Watchdog:
    """A thread that watches while it is entered.

    When nothing has happened for `patience` seconds it says what the run waits for, and writes where every thread is to
    `stalled`; the run goes on. With several ranks each one sends heartbeats to the job's store, also while it waits,
    and watches the next one: if that is not heard of for SILENCE seconds, it is named and the job is ended, which the
    others could not do themselves as they wait for it in a collective.

    Args:
        ranks: the processes that train together.
        patience: seconds; 0 never complains.
        stalled: the file for stack traces.
        say: shows a line.
        end: ends the process at once; takes the exit code.
    """

    def __init__(
        self,
        ranks: Ranks,
        patience: float,
        stalled: Path,
        say: Callable[[str], object],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._ranks, self._patience, self._stalled, self._say, self._end = ranks, patience, stalled, say, end
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Something has happened: `step` steps are done, and this is what comes now."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        self.at(self._step, self._doing)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave.set()
        self._thread.join()

    def _watch(self) -> None:
        pulse = Pulse(self._ranks) if self._ranks.size > 1 else None
        complained, count = 0.0, 0
        while True:  # a first heartbeat at once: who is lost before it has no name
            waited = time.monotonic() - self._since
            if not self._patience or waited < self._patience:
                complained = 0.0
            elif waited >= 2 * complained:  # and again after twice the time
                complained = waited
                self._complain(waited)
            if pulse is not None:
                count += 1
                try:
                    lost = pulse.beat(Heartbeat(count, socket.gethostname(), os.getpid(), self._step, self._doing))
                except (RuntimeError, dist.DistError) as error:
                    lost = f"the store of the job is gone, and with it its first machine ({_first_line(error)})"
                if lost:
                    print(f"error: {lost}; rank {self._ranks.rank} ends the job", file=sys.stderr, flush=True)
                    self._end(LOST)
                    return
            if self._leave.wait(BEAT if pulse else min(BEAT, self._patience or BEAT)):
                break
        if pulse is not None:
            pulse.finish()

    def _complain(self, waited: float) -> None:
        rank = f"rank {self._ranks.rank}: " if self._ranks.size > 1 else ""
        self._say(
            f"{rank}no step for {waited:.0f} s, after step {self._step}: {self._doing}; where every thread is: "
            f"{self._stalled}"
        )
        with open(self._stalled, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


class Pulse:
    """The heartbeats of a job's ranks, in the store that torchrun keeps: one key for each."""

    def __init__(self, ranks: Ranks) -> None:
        # a connection of its own: the collectives' one may be waiting
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self._store = dist.PrefixStore(f"heartbeats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._own, self._next = ranks.rank, (ranks.rank + 1) % ranks.size
        self._last = ""
        self._heard = time.monotonic()

    def beat(self, own: Heartbeat) -> str:
        """Send a heartbeat and listen for the next rank's; what to say if that is lost, or if another rank said so."""
        self._store.set(str(self._own), json.dumps(own))
        if self._store.check(["lost"]):
            return self._store.get("lost").decode()
        now = time.monotonic()
        heard = self._store.get(str(self._next)).decode() if self._store.check([str(self._next)]) else ""
        if heard != self._last or heard == FINISHED:
            self._last, self._heard = heard, now
        if now - self._heard < SILENCE:
            return ""
        lost = self._describe(heard)
        self._store.set("lost", lost)
        return lost

    def _describe(self, heard: str) -> str:
        if not heard:
            return f"rank {self._next} has not begun"
        last = Heartbeat(*json.loads(heard))
        return (
            f"rank {self._next} ({last.host}, pid {last.pid}) has not been heard of for {SILENCE:.0f} s; "
            f"its last step was {last.step}, then: {last.doing}"
        )

    def finish(self) -> None:
        """This rank needs no heartbeats any more."""
        with contextlib.suppress(RuntimeError, dist.DistError):  # nobody may be left to be told
            self._store.set(str(self._own), FINISHED)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
