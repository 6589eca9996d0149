"""The run directory: its files, and the checks before a run writes to it.

OUT/config.yaml       configuration, can be passed to --config
OUT/data_used.json    the images that the run uses, those left out, and a digest of their names
OUT/metrics.jsonl     metrics, one JSON object per line
OUT/tensorboard/      the same metrics for TensorBoard
OUT/train.log         printed lines with the time
OUT/kernels.json      formulation of the steps and the verdicts on its providers, with --fast-kernels
OUT/teacher.json      facts about the teacher, with --teacher
OUT/bad_images.json   error messages of images that were left out, if any
OUT/nonfinite.json    the non-finite tensor and the images of its batch, if that ended the run
OUT/stalled.txt       stack traces of all threads, if the run stalled
OUT/checkpoints/      step-00001234.pt, the newest two
OUT/.lock             locked by the process that writes to the directory
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.exported import MANIFEST

from ..config import RunConfig
from ..data.datasets.images import ImageDataset, Subset
from . import checkpoint
from .data_used import DATA_USED, names_digest, read_data_used
from .interruption import NOTHING
from .lock import lock
from .options import flag, key
from .saved_config import CONFIG, read_config

BAD_IMAGES = "bad_images.json"
LOCK = ".lock"


def check_out(config: RunConfig, resume: bool) -> None:
    """Check the output directory of a run without opening its images.

    Args:
        config: the configuration of the run.
        resume: whether to continue the run in `config.out`.

    Raises:
        InputError: `out` is a file, cannot be written to, contains a run, checkpoints or an exported network and
            `resume` is False, or contains no run and `resume` is True.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    atomic.check_writable(out)
    if resume:
        read_config(out, type(config))
    elif (out / CONFIG).exists():
        raise InputError(f"--out {out} holds a run already: add --resume to continue it, or choose another --out")
    elif checkpoint.latest(out / "checkpoints") is not None:
        raise InputError(f"--out {out} has checkpoints of a run without its {CONFIG}: choose another --out")
    elif (out / MANIFEST).exists():
        raise InputError(f"--out {out} is an exported network: choose another --out")


def check_run(config: RunConfig, resume: bool) -> None:
    """Check as `check_out`, and with `resume` also that the run in `out` has this configuration.

    Raises:
        InputError: as `check_out`, or the configuration is another one.
    """
    check_out(config, resume)
    if resume:
        out = Path(config.out)
        different = read_config(out, type(config)).differences(config)
        if different:
            raise InputError(
                f"the run in {out} has another {', '.join(flag(name) for name in different)}: "
                "resume it with its own configuration (--resume --out is enough) or start another --out"
            )


def raised_epochs(config: RunConfig) -> str:
    """A line that states that a resumed run has more epochs than its configuration; empty if it has as many."""
    saved = read_config(Path(config.out), type(config))
    if not saved.is_raised_by(config):
        return ""
    before, now = vars(saved)["epochs"], vars(config)["epochs"]
    return f"raised from {before} to {now} epochs: all schedules continue as in a run of {now} epochs at this step"


def open_run(config: RunConfig, resume: bool) -> Path:
    """Create and lock the run directory, or lock the one to resume.

    Args:
        config: the configuration of the run.
        resume: whether to continue the run in `config.out`; its config.yaml is written again if `epochs` was raised.

    Returns:
        The path of the directory.

    Raises:
        InputError: as `check_run`, or another process has the lock.
    """
    check_run(config, resume)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock(out.resolve() / LOCK)
    saved = read_config(out, type(config)) if (out / CONFIG).exists() else None
    if saved is None or saved.is_raised_by(config):
        options = {key(name): value for name, value in asdict(saved or config).items()}
        options["epochs"] = vars(config)["epochs"]
        note = f"# The images that the run uses, and those left out: {DATA_USED}\n"
        atomic.write_text(out / CONFIG, note + yaml.safe_dump(options, sort_keys=False))
    return out


def after_ctrl_c(out: Path) -> str:
    """What Ctrl-C leaves of a run, and how to go on: a clause for an error message."""
    if not (out / CONFIG).exists():
        return NOTHING
    step = checkpoint.latest_step(out / "checkpoints")
    return f"{f'saved up to step {step}' if step else 'no step was saved'}: continue with --resume --out {out}"


def _folder_of(data: str) -> str:
    """The folder of images with a final separator, as names of its files begin; empty for named datasets."""
    path = Path(data).expanduser()
    folder = str(path if path.is_dir() else path.parent)
    return "" if folder == "." else os.path.join(folder, "")


def read_bad_images(out: Path, data: str) -> dict[str, str]:
    """The images that the run in `out` has left out.

    Args:
        out: run directory.
        data: the name of the dataset, whose folder may have moved since then.

    Returns:
        Error messages by name of the image.

    Raises:
        InputError: the list is damaged.
    """
    path = out / BAD_IMAGES
    try:
        found = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it to count unreadable images again") from error
    return {os.path.join(_folder_of(data), name): reason for name, reason in found.items()}


def write_bad_images(out: Path, found: Mapping[str, str], data: str) -> None:
    """Write the error messages by name of the images that a run has left out, with names relative to the folder of
    `data`: on another machine it has another path."""
    folder = _folder_of(data)
    relative = {
        name.removeprefix(folder): reason.replace(name, name.removeprefix(folder)) for name, reason in found.items()
    }
    atomic.write_text(out / BAD_IMAGES, json.dumps(relative, indent=1) + "\n")


def without_bad_images(out: Path, images: ImageDataset, data: str) -> ImageDataset:
    """The images without those that the run in `out` has left out; prints how many these are.

    Args:
        out: run directory.
        images: training or test images.
        data: the name of their dataset. Of other images than those of the run, none is left out.
    """
    bad = read_bad_images(out, data)
    kept = [i for i in range(len(images)) if images.file(i) not in bad]
    if len(kept) == len(images) or not _are_of_run(out, images, data):
        return images
    print(
        f"left out: {len(images) - len(kept):,} images that the run could not read, see {out / BAD_IMAGES}", flush=True
    )
    return Subset(images, kept)


def _are_of_run(out: Path, images: ImageDataset, data: str) -> bool:
    """Whether images are those of a run, by the name of the dataset or by the names of its training images."""
    used = read_data_used(out)
    return used is None or used.data == data or used.digest == names_digest(images)
