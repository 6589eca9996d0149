"""The operator calls of the timed step: classes to verify, and a few to examine with tools.

Kernels depend on the size of images and not on their number, so calls can have fewer images than the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dspnet_fast.verification.calls import Call, Layout, parameters
from train.selection.recording import MEASURED, calls_of

from .step import SMALL, Case, configuration


def step_calls(case: Case, small: bool = SMALL) -> list[Call]:
    """The distinct calls of a training step of every subnet, without those of measurements."""
    return [
        call
        for call in calls_of(configuration(case, small=small))
        if not any(isinstance(part, Layout) and part.shape[:1] == (MEASURED,) for part in call.arguments)
    ]


def classes(calls: Sequence[Call]) -> list[Call]:
    """The largest call of each class: those with equal options, dtypes and kernel sizes."""
    largest: dict[tuple, Call] = {}
    for call in sorted(calls, key=_elements):
        largest[_class(call)] = call
    return list(largest.values())


def _class(call: Call) -> tuple:
    kinds: list[Any] = [call.operator]
    for name, argument in zip(parameters(call.operator), call.arguments, strict=True):
        if isinstance(argument, Layout):
            kinds.append((argument.dtype, argument.shape[2:] if name == "weight" else len(argument.shape)))
        elif name != "main_grad":  # does not change the kernels of a forward pass
            kinds.append("large" if type(argument) is int and argument > 7 else argument)
    return tuple(kinds)


def _elements(call: Call) -> int:
    return max((math.prod(part.shape) for part in call.arguments if isinstance(part, Layout)), default=0)


def examined(calls: Sequence[Call]) -> dict[str, Call]:
    """The largest call of each kernel that matters most, by a name."""
    found: dict[str, Call] = {}
    for call in sorted(calls, key=_elements):
        if not call.operator.startswith("conv_moments"):
            continue
        given = dict(zip(parameters(call.operator), call.arguments, strict=True))
        x, weight = given["x"], given["weight"]
        kernel, direction = weight.shape[2], "backward" if "backward" in call.operator else "forward"
        if weight.shape[1] == 1 and given["groups"] > 1:
            found[f"depthwise k{kernel} {direction}"] = call
        elif kernel == 1 and given["stride"] == 1:
            out_channels = given["y"].shape[1] if direction == "backward" else given["out_channels"]
            found[f"{'expand' if out_channels > x.shape[1] else 'project'} {direction}"] = call
    return found
