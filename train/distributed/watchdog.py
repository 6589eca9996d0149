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

from .process_group import World

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
        stalled: the file for stack traces; with several ranks each has its own, stalled-rank0.txt and so on.
        say: shows a line.
        end: ends the process at once; takes the exit code.
    """

    def __init__(
        self,
        ranks: World,
        patience: float,
        stalled: Path,
        say: Callable[[str], object],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._ranks, self._patience, self._stalled, self._say, self._end = ranks, patience, stalled, say, end
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._pulse: Pulse | None = None

    def at(self, step: int, doing: str) -> None:
        """Something has happened: `step` steps are done, and this is what comes now."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        self.at(self._step, self._doing)
        if self._ranks.size > 1:
            self._pulse = Pulse(self._ranks, lambda: (self._step, self._doing))
            self._pulse.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave.set()
        self._thread.join()
        if self._pulse is not None:
            # after an error others still wait for this rank: if its end takes long, it should be missed
            self._pulse.stop(finished=kind is None or issubclass(kind, SystemExit))

    def _watch(self) -> None:
        complained = 0.0
        while not self._leave.wait(BEAT if self._pulse else min(BEAT, self._patience or BEAT)):
            waited = time.monotonic() - self._since
            if not self._patience or waited < self._patience:
                complained = 0.0
            elif waited >= 2 * complained:  # and again after twice the time
                complained = waited
                with contextlib.suppress(Exception):  # such as a full disk: whoever trains will meet it too
                    self._complain(waited)
            if self._pulse is not None and (lost := self._pulse.lost):
                print(f"error: {lost}; rank {self._ranks.rank} ends the job", file=sys.stderr, flush=True)
                self._end(LOST)
                return

    def _complain(self, waited: float) -> None:
        stalled, rank = self._stalled, ""
        if self._ranks.size > 1:
            rank = f"rank {self._ranks.rank}: "
            stalled = stalled.with_stem(f"{stalled.stem}-rank{self._ranks.rank}")
        waits = f"no step for {waited:.0f} s, after step {self._step}: {self._doing}"
        self._say(f"{rank}{waits}; where every thread is: {stalled}")
        with open(stalled, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


class Pulse:
    """The heartbeats of a job's ranks, in the store that torchrun keeps: one key for each.

    In a thread of its own, since a store whose machine is gone does not answer at all.

    Args:
        ranks: the processes that train together.
        state: steps that are done, and what comes now.
    """

    def __init__(self, ranks: World, state: Callable[[], tuple[int, str]]) -> None:
        self._ranks, self._state = ranks, state
        self._next = (ranks.rank + 1) % ranks.size
        self._said = ""
        self._last, self._heard = "", time.monotonic()
        self._answered = time.monotonic()
        self._leave = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._send, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Begin to send and to listen."""
        self._answered = self._heard = time.monotonic()
        self._thread.start()

    def stop(self, finished: bool) -> None:
        """End; if this rank has finished, nobody will miss it."""
        self._finished = finished
        self._leave.set()
        self._thread.join(timeout=BEAT)

    @property
    def lost(self) -> str:
        """What to say if the next rank is lost, or if another rank said so; empty if all is well."""
        if not self._said and time.monotonic() - self._answered > SILENCE:
            return f"the store of the job, on its first machine, has not answered for {SILENCE:.0f} s"
        return self._said

    def _send(self) -> None:
        count = 0
        try:
            store = self._connect()
            while True:  # a first heartbeat at once: who is lost before it has no name
                count += 1
                self._said = self._said or self._beat(store, count)
                self._answered = time.monotonic()
                if self._leave.wait(BEAT):
                    break
            if self._finished:
                store.set(str(self._ranks.rank), FINISHED)
        except (RuntimeError, dist.DistError) as error:
            if not self._leave.is_set():  # at the end nobody may be left to be told
                self._said = f"the store of the job is gone, and with it its first machine ({_first_line(error)})"

    def _connect(self) -> dist.Store:
        """A connection of its own: that of the collectives may be waiting."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"heartbeats/{self._ranks.start}", store)

    def _beat(self, store: dist.Store, count: int) -> str:
        """Send a heartbeat and listen for the next rank's."""
        own = Heartbeat(count, socket.gethostname(), os.getpid(), *self._state())
        store.set(str(self._ranks.rank), json.dumps(own))
        if store.check(["lost"]):
            return store.get("lost").decode()
        now = time.monotonic()
        heard = store.get(str(self._next)).decode() if store.check([str(self._next)]) else ""
        if heard != self._last or heard == FINISHED:
            self._last, self._heard = heard, now
        if now - self._heard < SILENCE:
            return ""
        lost = self._describe(heard)
        store.set("lost", lost)
        return lost

    def _describe(self, heard: str) -> str:
        if not heard:
            return f"rank {self._next} has not begun"
        last = Heartbeat(*json.loads(heard))
        return (
            f"rank {self._next} ({last.host}, pid {last.pid}) has not been heard of for {SILENCE:.0f} s; "
            f"its last step was {last.step}, then: {last.doing}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
