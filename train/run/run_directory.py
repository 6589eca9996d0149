"""The run directory: what a run writes, where, and what it refuses to overwrite.

OUT/config.yaml       the configuration, re-runnable with --config
OUT/metrics.jsonl     one JSON object a line
OUT/tensorboard/      the same for TensorBoard
OUT/train.log         what was printed
OUT/bad_images.json   the images that were left out, and what is wrong with each; there only if there are any
OUT/nonfinite.json    what was not finite, and on which images; there only if that ended the run
OUT/stalled.txt       where every thread was when the run stood still; there only if it did
OUT/checkpoints/      step-00001234.pt, the newest two
OUT/.lock             held by the process that writes all this, as long as it lives
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from ..config import FinetuneConfig, PretrainConfig, RunConfig, flag, key

CONFIG = "config.yaml"
BAD_IMAGES = "bad_images.json"
LOCK = ".lock"
Config = TypeVar("Config", bound=RunConfig)
_locks: dict[Path, IO[str]] = {}  # this process's; closing a file would give its lock back


def read_config(out: Path, kind: type[Config]) -> Config:
    """The configuration of the run in `out`; InputError if there is none or it is not of this version or kind."""
    return read_any_config(out, kind)


def read_any_config(out: Path, *kinds: type[Config]) -> Config:
    """As `read_config`, of a run of any of these kinds."""
    if not (out / CONFIG).is_file():
        raise InputError(f"{out} holds no run: there is no {CONFIG} in it")
    options = _read(out / CONFIG)
    found = next((kind for kind in kinds if options.keys() <= _names(kind).keys()), None)
    other = _kind_of(options)
    if found is None and other is not None:
        taken = " or ".join(kind.command for kind in kinds)
        raise InputError(f"{out} is a run of {other.command}; this command takes one of {taken}")
    return _made(out / CONFIG, options, found or kinds[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} is not a configuration of this version: it holds no options")
    return options


def _made(path: Path, options: dict[str, Any], kind: type[Config]) -> Config:
    names = _names(kind)
    try:
        return kind(**{names.get(name, name): value for name, value in options.items()})
    except TypeError as error:
        raise InputError(f"{path} is not a configuration of this version: {error}") from error


def _names(kind: type[RunConfig]) -> dict[str, str]:
    """Fields by what they are called in YAML."""
    return {key(f.name): f.name for f in fields(kind)}


def _kind_of(options: dict[str, Any]) -> type[RunConfig] | None:
    """Whose configuration has these options."""
    kinds: tuple[type[RunConfig], ...] = (PretrainConfig, FinetuneConfig)
    return next((kind for kind in kinds if options.keys() <= _names(kind).keys()), None)


def with_own_config(argv: Sequence[str]) -> list[str]:
    """A resumed run starts from its own configuration; what else the command line says comes after it."""
    arguments = list(argv)
    if "--resume" not in arguments:
        return arguments
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--out":
            out = value or "".join(arguments[index + 1 : index + 2])
            if (Path(out) / CONFIG).is_file():
                return ["--config", str(Path(out) / CONFIG), *arguments]
    return arguments


def check_out(config: RunConfig, resume: bool) -> None:
    """Raise InputError if `out` holds a run, or with `resume` none: what can be said before there are images."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    if resume:
        read_config(out, type(config))
    elif (out / CONFIG).exists():
        raise InputError(f"--out {out} holds a run already: add --resume to continue it, or choose another --out")


def check_run(config: RunConfig, resume: bool) -> None:
    """As `check_out`, and with `resume` InputError if the run in `out` is one of another configuration."""
    check_out(config, resume)
    if resume:
        out = Path(config.out)
        different = read_config(out, type(config)).differences(config)
        if different:
            raise InputError(
                f"the run in {out} has another {', '.join(flag(name) for name in different)}: "
                "resume it with its own configuration (--resume --out is enough) or start another --out"
            )


def open_run(config: RunConfig, resume: bool) -> Path:
    """Create the run directory, or check that the run in it is the one to resume; InputError as `check_run`.

    Until this process ends, no other may open the run: InputError there.
    """
    check_run(config, resume)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    _lock(out.resolve() / LOCK)
    if not (out / CONFIG).exists():
        options = {key(name): value for name, value in asdict(config).items()}
        atomic.write_text(out / CONFIG, yaml.safe_dump(options, sort_keys=False))
    return out


def _lock(path: Path) -> None:
    if path in _locks:
        return
    file = open(path, "a+")  # noqa: SIM115  (open as long as the process)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{holder} is writing to the run in {path.parent}: wait for its end, or choose another --out"
            ) from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"this file system knows no locks: see to it yourself that no other process writes to {path.parent}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file


class RunLog:
    """Writes lines to train.log, metrics to metrics.jsonl and TensorBoard.

    Args:
        out: the run directory.
        step: where the run continues; metrics of later steps, written before an interruption, are dropped.

    Every method raises InputError if the disk is full.
    """

    def __init__(self, out: Path, step: int) -> None:
        # imported here: it takes seconds, and commands that only read a run need not wait for it
        from torch.utils.tensorboard import SummaryWriter

        metrics = out / "metrics.jsonl"
        if metrics.exists():
            atomic.write_text(metrics, "".join(f"{line}\n" for line in _lines_until(metrics, step)))
        self._out = out
        with atomic.needs_room(out):
            self._metrics = open(metrics, "a", buffering=1)  # noqa: SIM115  (closed by close)
            self._log = open(out / "train.log", "a", buffering=1)  # noqa: SIM115
            self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def line(self, text: str) -> None:
        """Append a line with the time to train.log."""
        with atomic.needs_room(self._out):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Record values (numbers, or dictionaries of numbers by subnet) for a step."""
        with atomic.needs_room(self._out):
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                scalars = value if isinstance(value, dict) else {"": value}
                for part, scalar in scalars.items():
                    self._tensorboard.add_scalar(f"{name}/{part}" if part else name, scalar, step)

    def sync(self) -> None:
        """Wait until the metrics are on the disk: to be called before a checkpoint says that they are behind it."""
        with atomic.needs_room(self._out):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Flush everything to disk."""
        with atomic.needs_room(self._out), ExitStack() as each:  # one that fails does not keep the others open
            for part in (self._tensorboard, self._metrics, self._log):
                each.callback(part.close)


def read_bad_images(out: Path) -> dict[str, str]:
    """The images that the run in `out` has left out so far, and why; InputError if the list is damaged."""
    path = out / BAD_IMAGES
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a list of images ({error}): remove it to count bad images anew") from error


def write_bad_images(out: Path, found: dict[str, str]) -> None:
    """Keep them for who resumes the run, or repairs them."""
    atomic.write_text(out / BAD_IMAGES, json.dumps(found, indent=1) + "\n")


def _lines_until(metrics: Path, step: int) -> list[str]:
    """Whole lines of steps up to `step`; a kill can leave half a line at the end."""
    lines = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All recorded metrics of a run, in order."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
