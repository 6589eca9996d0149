"""The watchdog: reports a stalled process, and ends the job when another rank is lost."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from dspnet_fast.errors import first_line

from .process_group import World

HEARTBEAT_SECONDS = 2.0  # between heartbeats
SILENT_SECONDS = 20.0  # without a heartbeat a rank is lost; torchrun then takes up to 30 s to end the others
LOST_RANK = 70  # exit code of a rank that found another one lost
FINISHED = "finished"


class Heartbeat(NamedTuple):
    """A rank's state: a growing count, host, process id, steps done, and current activity."""

    beats: int
    host: str
    pid: int
    step: int
    doing: str


class Watchdog:
    """A context manager whose thread watches the run.

    After `timeout` seconds without progress it prints the current activity and writes the stack of every thread to
    `stalled`; the run continues. With several ranks, each sends heartbeats to the job's store, also while it waits, and
    watches the next rank. An unresponsive rank is detected by its missing heartbeats, named, and the job is ended,
    which the other ranks could not do themselves: they wait for it in a collective.

    Args:
        world: the process group.
        timeout: seconds; 0 never reports a stall.
        stalled: file for the stack traces; with several ranks stalled-rank0.txt and so on.
        report: prints a line.
        end: ends the process at once, with an exit code.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        stalled: Path,
        report: Callable[[str], object],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._world, self._timeout, self._stalled, self._report, self._end = world, timeout, stalled, report, end
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heartbeats: Heartbeats | None = None

    def at(self, step: int, doing: str) -> None:
        """Record progress: `step` steps are done, and `doing` is the activity that begins."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Report no stall during work that may take long without steps."""
        self._since = float("inf")
        try:
            yield
        finally:
            self.at(self._step, self._doing)

    def __enter__(self) -> Watchdog:
        self.at(self._step, self._doing)
        if self._world.size > 1:
            self._heartbeats = Heartbeats(self._world, lambda: (self._step, self._doing))
            self._heartbeats.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._heartbeats is not None:
            # After an error the others still wait for this rank: if its end takes long, they must miss its heartbeats.
            self._heartbeats.stop(finished=kind is None or issubclass(kind, SystemExit))

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(
            HEARTBEAT_SECONDS if self._heartbeats else min(HEARTBEAT_SECONDS, self._timeout or HEARTBEAT_SECONDS)
        ):
            waited = time.monotonic() - self._since
            if not self._timeout or waited < self._timeout:
                reported = 0.0
            elif waited >= 2 * reported:  # again after twice the time
                reported = waited
                with contextlib.suppress(Exception):  # a full disk, for example, which the training will report
                    self._report_stall(waited)
            if self._heartbeats is not None and (lost := self._heartbeats.lost):
                print(f"error: {lost}; rank {self._world.rank} ends the job", file=sys.stderr, flush=True)
                self._end(LOST_RANK)
                return

    def _report_stall(self, waited: float) -> None:
        stalled, rank = self._stalled, ""
        if self._world.size > 1:
            rank = f"rank {self._world.rank}: "
            stalled = stalled.with_stem(f"{stalled.stem}-rank{self._world.rank}")
        waits = f"no step for {waited:.0f} s, after step {self._step}: {self._doing}"
        self._report(f"{rank}{waits}; where every thread is: {stalled}")
        with open(stalled, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


class Heartbeats:
    """The heartbeats of a job's ranks in torchrun's store, one key per rank.

    They have a thread of their own, because a store whose machine has failed does not answer at all.

    Args:
        world: the process group.
        state: returns the steps done and the current activity.
    """

    def __init__(self, world: World, state: Callable[[], tuple[int, str]]) -> None:
        self._world, self._state = world, state
        self._next = (world.rank + 1) % world.size
        self._verdict = ""
        self._last, self._heard = "", time.monotonic()
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Start sending and watching."""
        self._answered = self._heard = time.monotonic()
        self._thread.start()

    def stop(self, finished: bool) -> None:
        """Stop; a rank that has finished is not reported as lost."""
        self._finished = finished
        self._stop.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)

    @property
    def lost(self) -> str:
        """The message about a lost rank or store, found here or by another rank; empty while all respond."""
        if not self._verdict and time.monotonic() - self._answered > SILENT_SECONDS:
            return f"the store of the job, on its first machine, has not answered for {SILENT_SECONDS:.0f} s"
        return self._verdict

    def _run(self) -> None:
        count = 0
        try:
            store = self._connect()
            while True:  # the first heartbeat at once: a lost rank without one has no host name
                count += 1
                self._verdict = self._verdict or self._beat(store, count)
                self._answered = time.monotonic()
                if self._stop.wait(HEARTBEAT_SECONDS):
                    break
            if self._finished:
                store.set(str(self._world.rank), FINISHED)
        except (RuntimeError, dist.DistError) as error:
            if not self._stop.is_set():  # at the end the store may already be closed
                self._verdict = f"the store of the job is gone, and with it its first machine ({first_line(error)})"

    def _connect(self) -> dist.Store:
        """A separate connection: that of the collectives may be blocked."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"heartbeats/{self._world.launch_id}", store)

    def _beat(self, store: dist.Store, count: int) -> str:
        """Send a heartbeat and read the next rank's; returns a message if a rank is lost."""
        own = Heartbeat(count, socket.gethostname(), os.getpid(), *self._state())
        store.set(str(self._world.rank), json.dumps(own))
        if store.check(["lost"]):
            return store.get("lost").decode()
        now = time.monotonic()
        heard = store.get(str(self._next)).decode() if store.check([str(self._next)]) else ""
        if heard != self._last or heard == FINISHED:
            self._last, self._heard = heard, now
        if now - self._heard < SILENT_SECONDS:
            return ""
        lost = self._describe(heard)
        store.set("lost", lost)
        return lost

    def _describe(self, heard: str) -> str:
        if not heard:
            return f"rank {self._next} has not begun"
        last = Heartbeat(*json.loads(heard))
        return (
            f"rank {self._next} ({last.host}, pid {last.pid}) has not been heard of for {SILENT_SECONDS:.0f} s; "
            f"its last step was {last.step}, then: {last.doing}"
        )
