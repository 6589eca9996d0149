"""OUT/data_used.json: the images that a run trains on, and whether a resumed run finds the same ones."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from ..data.datasets.folder_files import DATA_USED
from ..data.datasets.images import ImageDataset
from .fingerprint import digest


@dataclass(frozen=True)
class DataUsed:
    """The images of a run.

    Attributes:
        data: --data.
        images: number of training images.
        test_images: number of labelled test images, or None if there are none or they were not opened.
        left_out: left-out files with the reason, or an empty string.
        digest: of the names of the training images, relative to their common folder, in order.
        epoch_steps: steps per epoch, which the schedules keep when images are added.
        since_step: the step from which the run uses these images.
        earlier: the images that the run used before.
        classes: number and names of the classes, which pretraining does not use; empty without classes.
    """

    data: str
    images: int
    test_images: int | None
    left_out: str
    digest: str
    epoch_steps: int
    since_step: int = 0
    earlier: tuple[dict[str, Any], ...] = ()
    classes: str = ""

    def line(self) -> str:
        """One line for the start of a run."""
        tests = "" if self.test_images is None else f", {self.test_images:,} held out for tests"
        return "; ".join(filter(None, (f"{self.images:,} images for training{tests}", self.left_out, self.classes)))

    def resumed(self, before: DataUsed | None, step: int, out: Path) -> tuple[DataUsed, str]:
        """Compare with the images that the run used so far.

        Args:
            before: content of the run's file; None for a run without one.
            step: the step at which the run continues.
            out: the run directory.

        Returns:
            The new content of the file, and a line that states a change; an empty line if the images are the same.

        Raises:
            InputError: images are missing.
        """
        if before is None:
            return self, ""
        if self.images < before.images:
            raise InputError(
                f"{self.data} has {self.images:,} images, and the run in {out} used {before.images:,}: put the missing "
                f"images back, or remove {out / DATA_USED} to continue with those that are there"
            )
        if self.digest == before.digest:
            return replace(before, test_images=self.test_images, left_out=self.left_out, classes=self.classes), ""
        line = (
            f"the images have changed since the run began: {self.images:,}, before {before.images:,}"
            if self.images != before.images
            else f"the names of the {self.images:,} images have changed since the run began"
        )
        old = {name: value for name, value in asdict(before).items() if name != "earlier"}
        now = replace(self, epoch_steps=before.epoch_steps, since_step=step, earlier=(*before.earlier, old))
        return now, f"{line}; the schedules keep {before.epoch_steps} steps per epoch"


def data_used(data: str, images: ImageDataset, test: ImageDataset | None, epoch_steps: int) -> DataUsed:
    """Describe the images of a new run.

    Args:
        data: --data.
        images: training images.
        test: test images, if they were opened.
        epoch_steps: steps per epoch.
    """
    tests = None if test is None or test.labels is None else len(test)
    several = f"{len(images.classes)} classes: {', '.join(images.classes[:3])}{', ...' if images.classes[3:] else ''}"
    classes = several if images.classes else ""
    return DataUsed(data, len(images), tests, images.note, names_digest(images), epoch_steps, classes=classes)


def names_digest(images: ImageDataset) -> str:
    """A digest of the names of images relative to their common folder, whose path differs between machines."""
    files = [images.file(i) for i in range(len(images))]
    common = os.path.commonprefix([files[0], files[-1]])
    return digest(*(file.removeprefix(common) for file in files))


def read_data_used(out: Path) -> DataUsed | None:
    """Read the file of the run in `out`; None if there is none, InputError if it is damaged."""
    path = out / DATA_USED
    try:
        return DataUsed(**json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it to use the images that are there") from error


def write_data_used(out: Path, used: DataUsed) -> None:
    """Write the file of the run in `out`."""
    atomic.write_text(out / DATA_USED, json.dumps(asdict(used), indent=1) + "\n")
