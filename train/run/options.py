"""Options of commands: dataclass fields with help texts and rules, and the texts that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

from dspnet_fast.errors import InputError

Workers = int | Literal["auto"]  # image loading processes
MAX_WORKERS = 8  # maximum of "auto"
SMALL_SET = 256  # number of images up to which "auto" is 0: starting workers would take longer
WORKERS_HELP = (
    f"image loading processes; 0: load in the main process; auto: one per core, at most {MAX_WORKERS}, and 0 for up to "
    f"{SMALL_SET} images"
)
FAST_KERNELS_HELP = (
    "use the fused operators if a verdict on this device, or in short runs what is known of it, says that they are "
    "faster; see docs/selection.md"
)
LOG_TO_HELP = "programs that show the metrics: some of tensorboard, wandb and mlflow, separated by commas; or none"
PLUGINS_HELP = "modules or .py files, separated by commas, that register providers of operators"
STALL_HELP = "seconds without a step after which a stall is reported, with the stack of every thread; 0: never"
DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_HELP = "cpu; cuda; mps, an Apple GPU; or auto, which is cuda if there is such a GPU, else cpu"


@dataclass(frozen=True)
class Rule:
    """The valid values of an option. text: completes "the option must ..."."""

    text: str
    holds: Callable[[Any], bool]


def option(
    default: Any, help: str, changeable: bool = False, metavar: str | None = None, rule: Rule | None = None
) -> Any:
    """Make a dataclass field that is an option.

    Args:
        default: default value; None in a field of another type: `recipe.complete` (train/pretraining) chooses one.
        help: help text, a noun phrase.
        changeable: whether a resumed run may have another value.
        metavar: placeholder of the value in the help.
        rule: valid values besides None, see `check_options`.
    """
    metadata = {"help": help, "changeable": changeable, "metavar": metavar, "rule": rule}
    return field(default=default, metadata=metadata)


TWO_IMAGES = Rule("be at least 2, for batch normalisation", lambda value: value >= 2)
# Options with a rule; arguments as of `option`.
count = partial(option, rule=Rule("be at least 1", lambda value: value >= 1))
not_negative = partial(option, rule=Rule("be at least 0", lambda value: value >= 0))
positive = partial(option, rule=Rule("be above 0", lambda value: value > 0))
fraction = partial(option, rule=Rule("lie between 0 and 1", lambda value: 0 <= value <= 1))
below_one = partial(option, rule=Rule("be at least 0 and below 1", lambda value: 0 <= value < 1))


def choice(default: Any, values: Sequence[str], help: str, changeable: bool = False, metavar: str | None = None) -> Any:
    """Make an option that is one of several values; other arguments as of `option`."""
    return option(
        default, help, changeable, metavar, Rule(f"be one of {', '.join(values)}", lambda value: value in values)
    )


def check_options(options: Any) -> None:
    """Raise InputError for the first option of a dataclass that breaks its rule, or is infinite or not a number."""
    for f in fields(options):
        value, rule = getattr(options, f.name), f.metadata["rule"]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag(f.name)} must be a finite number, not {value}")
        if value is not None and rule is not None and not rule.holds(value):
            raise InputError(f"{flag(f.name)} must {rule.text}, not {value!r}")


def key(name: str) -> str:
    """The YAML key of an option: the field's name without the trailing _ of `from_`, a Python keyword."""
    return name.rstrip("_")


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + key(name).replace("_", "-")
