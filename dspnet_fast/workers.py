"""Processes that may crash or hang, and report by lines of JSON.

The parent starts a module with `Worker` and reads lines with a time limit; the child begins with `receive`, which
prepares it like the parent and returns the job and the function that reports.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from . import plugins, settings

PR_SET_PDEATHSIG = 1
END_SECONDS = 30.0  # for a process to end


class Worker:
    """A process that runs a module on a job. A context manager that ends the process.

    Args:
        module: name of the module, run as `python -m`.
        job: anything that pickles; `receive` returns it.
        device: the device that the process uses.
        plugins: modules that it imports first, see `dspnet_fast.plugins`.
    """

    def __init__(self, module: str, job: object, device: torch.device, plugins: str = "") -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        environment = {name: value for name, value in os.environ.items() if name != "DSPNET_KERNELS"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read_all, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin:
            pickle.dump((settings.read(), device, plugins, job), self._process.stdin)

    def _read_all(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a line that the end of the process cut off
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def read(self, seconds: float) -> dict[str, Any] | None:
        """The next line, or None after the last. TimeoutError if it does not come in time."""
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty as error:
            raise TimeoutError from error

    def failure(self) -> str:
        """How the process ended, in words; to be called after its last line."""
        code = self._ended()
        self._errors.seek(0)
        last = next((line.strip() for line in reversed(self._errors.readlines()) if line.strip()), "")
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"{names.get(-code, f'signal {-code}')} ended the process"
        return f"the process ended with exit code {code}" + (f": {last}" if last else "")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._ended()
        self._reader.join(END_SECONDS)
        self._errors.close()

    def _ended(self) -> int:
        """The exit code; that of a killed process if it does not end, as while a GPU does not respond."""
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def receive() -> tuple[Any, torch.device, Callable[..., None]]:
    """In the child: the job, the device, and a function that reports its keyword arguments as a line.

    The child then has the parent's settings and plugins, ends with its parent, leaves Ctrl-C to it, and writes no core
    dump.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(AttributeError):  # Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no line of the report

    def report(**line: Any) -> None:
        stream.write(json.dumps(line) + "\n")
        stream.flush()

    of_parent, device, names, job = pickle.load(sys.stdin.buffer)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings.apply(of_parent)
    plugins.load(names)
    return job, device, report
