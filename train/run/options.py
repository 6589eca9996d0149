"""What option classes are written with: fields with help texts, checks, and the texts that several commands share."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from dspnet_fast.errors import InputError

Workers = int | Literal["auto"]  # image loading processes
MAX_WORKERS = 8  # maximum of "auto"
SMALL_SET = 256  # number of images up to which "auto" is 0: starting workers would take longer
WORKERS_HELP = (
    f"image loading processes; 0 loads in the main process; auto: one per core, at most {MAX_WORKERS}, and 0 for sets "
    f"of up to {SMALL_SET} images"
)
FAST_KERNELS_HELP = "compute steps in the fastest way that is verified on this device; see docs/selection.md"
LOG_TO_HELP = "programs that show the metrics: tensorboard, wandb, mlflow, separated by commas, or none"
PLUGINS_HELP = "modules or .py files, separated by commas, that register providers"
DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_HELP = "auto, which is cuda or cpu; cpu; cuda; or mps, an Apple GPU"


def option(default: Any, help: str, changeable: bool = False, metavar: str | None = None) -> Any:
    """Make a dataclass field that is an option.

    Args:
        default: default value; None in a field of another type: `resolve` chooses one (train/pretraining/recipe.py).
        help: help text, a noun phrase.
        changeable: whether a resumed run may have another value.
        metavar: placeholder of the value in the help.
    """
    return field(default=default, metadata={"help": help, "changeable": changeable, "metavar": metavar})


def key(name: str) -> str:
    """The YAML key of an option: the field's name without the trailing _ of `from_`, a Python keyword."""
    return name.rstrip("_")


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + key(name).replace("_", "-")


def positive(**values: float) -> None:
    """Raise InputError for options that are not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{flag(name)} must be above 0, not {value}")


def two_images(batch_size: int) -> None:
    """Raise InputError for a batch of fewer than two images, whose variance batch normalisation cannot take."""
    if batch_size < 2:
        raise InputError(f"--batch-size must be at least 2, for batch normalisation, not {batch_size}")
