"""Arguments for fuzzing.py: nearly valid ones, any that the schema allows, and some that it does not.

All are derived from the schemas and from FORMS, the shapes that belong together.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fuzz_tensors import DTYPES, STATES, VAST, Made, Same, dense
from hypothesis import strategies as st

from dspnet_fast.ops.deferred import ACTS

# Sizes of tensors and numbers, by name: "V" views of "M" images each, "N" in all; "O+" is a weight's full size. A star
# stands for the dtype of activations, a plus for that or fp32, whichever is wider.
IMAGES = "* N C H W"
OUTPUT = "* N O Y X"
DEFERRED = {"x": IMAGES, "scale": "V C", "shift": "V C", "gate": "N C"}
RESIDUAL = {"residual": IMAGES, "residual_scale": "V C", "residual_shift": "V C"}
CONV = {"weight": "O+ I+ K K", "main_grad": "O+ I+ K K", "stride": "S", "padding": "P", "groups": "G"}
POOLED = {"pooled_grad": "N O", "pooled_scale": "V O", "pooled_shift": "V O"}
MOMENTS = {"mean": "V O", "grad_mean": "V O", "grad_variance": "V O"}
SLIM_CONV = {name: f"* {form}" for name, form in CONV.items() if name.endswith(("weight", "grad"))} | {
    "x": IMAGES,
    "bias": "* O",
    "stride": "S S",
    "padding": "P P",
    "dilation": "1 1",
    "groups": "G",
}
LINEAR = {"x": "* N C", "weight": "* O+ C+", "main_grad": "* O+ C+", "bias": "* O", "grad": "* N O"}
NORM = {"x": IMAGES, "weight": "C", "bias": "C", "views": "V", "grad_y": IMAGES}
VIEWS = dict.fromkeys(("mean", "variance", "grad_mean", "grad_variance", "grad_scale", "grad_shift"), "V C")
VECTORS = dict.fromkeys(("weight", "weight_main_grad", "bias", "bias_main_grad"), "C+")
NORM_VECTORS = dict.fromkeys((f"norm_{name}" for name in VECTORS), "O+")
FLAT = dict.fromkeys(("params", "grads", "momenta"), "* 3T")
FORMS: dict[str, dict[str, str]] = {
    "adamw_ema_step": FLAT
    | {"variances": "* 3T", "targets": "* 2T", "starts": "0 T", "sizes": "T T"}
    | dict.fromkeys(("steps", "lr", "weight_decay", "tau"), "+"),
    "conv_moments": DEFERRED | CONV | {"out_channels": "O", "views": "V"},
    "conv_moments_backward": DEFERRED | CONV | MOMENTS | POOLED | {"grad_y": OUTPUT, "y": OUTPUT},
    "conv_norm": DEFERRED | CONV | {"out_channels": "O", "views": "V"} | NORM_VECTORS,
    "ema_update": {"targets": IMAGES, "onlines": IMAGES},
    "lars_ema_step": FLAT | {"targets": "* 2T", "starts": "0 T", "sizes": "T T", "lr": "+", "tau": "+"},
    "norm_act": DEFERRED | RESIDUAL,
    "norm_act_backward": DEFERRED | RESIDUAL | {"grad": IMAGES},
    "norm_act_pool": DEFERRED,
    "norm_act_pool_backward": DEFERRED | dict.fromkeys(("grad", "gradient_mean", "gradient_x_mean"), "N C"),
    "normalized_mse": {"p": "* N C", "z": "* N C"},
    "normalized_mse_backward": {"p": "* N C", "z": "* N C", "grad": "+"},
    "scale_shift": VIEWS | VECTORS,
    "scale_shift_backward": VIEWS | VECTORS,
    "slim_batch_norm": NORM,
    "slim_batch_norm_backward": NORM | VIEWS,
    "slim_conv2d": SLIM_CONV | {"out_channels": "O"},
    "slim_conv2d_backward": SLIM_CONV | {"grad": OUTPUT},
    "slim_linear": LINEAR | {"out_features": "O"},
    "slim_linear_backward": LINEAR,
}
# With gradients in C++.
RECORDED = ("conv_moments", "conv_norm", "norm_act", "norm_act_pool", "scale_shift", "slim_linear")
FORMS |= {f"{name}_autograd": FORMS[name] for name in RECORDED}
STORED = {
    "normalized_mse": 4,
    "ema_update": 4,
    "lars_ema_step": 2,
    "adamw_ema_step": 2,
}  # number of KINDS in use; otherwise ACTIVATIONS are
KINDS = ("float32", "float64", "bfloat16", "float16")
ACTIVATIONS = ("float32", "float32", "bfloat16")

few = st.integers(1, 4)
several = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 24, 31, 33, 48, 64, 70)))
lengths = st.one_of(st.integers(1, 6), st.sampled_from((8, 13)))


@st.composite
def sizes(draw: Callable) -> dict[str, int]:
    """Sizes that belong together. Sometimes one is replaced by 0, 1 or 2 wherever it occurs."""
    size = {name: draw(few) for name in "VMSP"} | {name: draw(several) for name in "COT"}
    size |= {name: draw(lengths) for name in "HW"}
    size |= {"K": draw(st.sampled_from((1, 1, 2, 3, 5, 7))), "P": size["P"] - 1, "extra": size["M"] - 1}
    if draw(st.integers(0, 5)) == 0:
        size[draw(st.sampled_from(sorted(size)))] = draw(st.sampled_from((0, 0, 1, 2)))
    depthwise = draw(st.booleans())
    if depthwise:
        size |= {"O": size["C"]}
    stride = max(size["S"], 1)
    return size | {
        **{"N": size["V"] * size["M"], "G": size["C"] if depthwise else 1, "0": 0, "1": 1},
        **{"O+": size["O"] + size["extra"], "C+": size["C"] + size["extra"]},
        **{"I+": 1 if depthwise else size["C"] + size["extra"], "2T": 2 * size["T"], "3T": 3 * size["T"]},
        "Y": max((size["H"] + 2 * size["P"] - size["K"]) // stride + 1, 0),
        "X": max((size["W"] + 2 * size["P"] - size["K"]) // stride + 1, 0),
    }


@st.composite
def valid(draw: Callable, name: str, schema: Any) -> dict[str, Any]:
    """Arguments that the operator accepts, except for some sizes. A tensor without a form is arbitrary."""
    size, forms = draw(sizes()), FORMS.get(name, {})
    kinds = KINDS[: STORED.get(name.removesuffix("_backward"), 0)] or ACTIVATIONS
    stored, one_row, flat = draw(st.sampled_from(kinds)), draw(st.booleans()), draw(st.integers(0, 4)) == 0
    absent = {stem: draw(st.booleans()) for stem in ("scale", "gate", "residual", "grad", "weight", "bias")}
    values: dict[str, Any] = {}
    for argument in schema.arguments:
        kind, form = str(argument.type), forms.get(argument.name, "").split()
        shape = [size[part] for part in form if part not in "*+"]
        if argument.name not in forms or "bool" in kind:
            values[argument.name] = draw(random_value(kind, valid_only=True))
        elif kind == "int":
            values[argument.name] = shape[0]
        elif kind == "List[int]":
            values[argument.name] = shape
        else:
            dtype = stored if "*" in form else "float64" if "+" in form and stored == "float64" else "float32"
            if one_row and form == ["V", "C"] and name.startswith(("norm", "conv")):
                shape[0] = 1
            if "slim_batch_norm" in name and flat and form == IMAGES.split():
                shape = shape[:2]
            tensor = dense(*shape, dtype=dtype, channels_last=len(shape) == 4 and "*" in form)
            values[argument.name] = [tensor] * size["V"] if kind.startswith("List") else tensor
            stems = [stem for stem in absent if stem in argument.name.replace("shift", "scale")]
            if kind.startswith("Optional") and any(absent[stem] for stem in stems):
                values[argument.name] = None
    return values


INTEGERS = (0, 1, -1, 2, 3, 7, 2**20 - 1, 2**20, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**63, 2**70)
inf, nan = math.inf, math.nan
FLOATS = (0.0, 1e-5, 0.5, 0.99, 1.0, -0.0, -1.0, 1e-310, 3e38, 1e308, inf, -inf, nan)
STRINGS = (*ACTS, "", "mish", "ReLU", "relu ", "relu\0", "identity" * 1000, "é", "\N{SNOWMAN}")
# A sanitizer ends the process if an allocation fails, instead of raising an exception, and needs much memory itself.
VAST_TENSORS = "libasan" not in os.environ.get("LD_PRELOAD", "")


@st.composite
def random_tensor(draw: Callable) -> Made:
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 8, 17)), max_size=5)))
    made = replace(dense(*shape), dtype=draw(st.sampled_from(DTYPES)), state=draw(st.sampled_from(("", "", *STATES))))
    return draw(laid_out(made))


@st.composite
def laid_out(draw: Callable, made: Made) -> Made:
    """The same shape with another memory layout."""
    dims = [*range(len(made.shape))]
    strides = list(made.strides)
    match draw(st.sampled_from(("order", "steps", "offset", "repeated", "overlapping", "channels last", "begin"))):
        case "order":
            order, step = draw(st.permutations(dims)), 1
            for dim in order:
                strides[dim], step = step, step * max(made.shape[dim], 1)
        case "steps":
            factor = draw(few)
            strides = [stride * factor for stride in strides]
        case "offset":
            return replace(made, offset=draw(several))
        case "repeated" if dims:
            strides[draw(st.sampled_from(dims))] = 0
        case "overlapping":
            strides = [draw(st.integers(0, 4)) for _ in dims]
        case "channels last" if len(dims) == 4:
            strides = list(dense(*made.shape, channels_last=True).strides)
        case _:
            return replace(made, at_end=not made.at_end)
    changed = replace(made, strides=tuple(strides))
    return changed if changed.fits() else made


@st.composite
def reshaped(draw: Callable, made: Made) -> Made:
    """A similar shape."""
    shape = list(made.shape)
    place = draw(st.integers(0, max(len(shape) - 1, 0)))
    what = draw(st.sampled_from(("add", "drop", "swap", "resize", "vast")))
    if what == "add" or not shape:
        shape.insert(place, draw(st.sampled_from((0, 1, 2))))
    elif what == "drop":
        del shape[place]
    elif what == "swap":
        other = draw(st.integers(0, len(shape) - 1))
        shape[place], shape[other] = shape[other], shape[place]
    elif what == "resize":
        shape[place] = draw(st.sampled_from((0, 1, 2, shape[place] + 1, max(shape[place] - 1, 0), 2 * shape[place])))
    elif VAST_TENSORS and made.state in ("", "meta"):
        shape[place] = VAST
        strides = tuple(0 if dim == place else stride for dim, stride in enumerate(made.strides))
        return replace(made, shape=tuple(shape), strides=strides)
    was_last = len(made.shape) == 4 and made.strides == dense(*made.shape, channels_last=True).strides
    strides = dense(*shape, channels_last=was_last and len(shape) == 4).strides
    changed = replace(made, shape=tuple(shape), strides=strides)
    return changed if changed.fits() else made


def random_value(kind: str, valid_only: bool = False) -> st.SearchStrategy:
    """A value of a schema's type. valid_only: one that operators usually accept."""
    if kind.startswith("Optional["):
        return st.one_of(st.none(), random_value(kind[9:-1], valid_only))
    if kind.startswith("List["):
        return st.lists(random_value(kind[5:-1], valid_only), max_size=4)
    return {
        "Tensor": random_tensor(),
        "int": few if valid_only else st.one_of(st.sampled_from(INTEGERS), st.integers()),
        "float": st.sampled_from(FLOATS[:5]) if valid_only else st.one_of(st.sampled_from(FLOATS), st.floats()),
        "bool": st.booleans(),
        "str": st.sampled_from(ACTS) if valid_only else st.one_of(st.sampled_from(STRINGS), st.text(max_size=8)),
    }[kind]


@st.composite
def changed_value(draw: Callable, kind: str, value: Any, tensors: Sequence[str]) -> Any:
    """A similar value of a schema's type, or an arbitrary one."""
    if isinstance(value, Made):
        match draw(st.sampled_from(("layout", "layout", "shape", "shape", "dtype", "state", "same", "other"))):
            case "layout":
                return draw(laid_out(value))
            case "shape":
                return draw(reshaped(value))
            case "dtype":
                return replace(value, dtype=draw(st.sampled_from(DTYPES)))
            case "state":
                return replace(value, state=draw(st.sampled_from(STATES)))
            case "same":
                return Same(draw(st.sampled_from(tensors)))
    elif isinstance(value, list) and value and kind.startswith("List["):
        place = draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(("change", "change", "drop", "double", "other"))):
            case "change":
                inner = draw(changed_value(kind[5:-1], value[place], tensors))
                return [*value[:place], inner, *value[place + 1 :]]
            case "drop":
                return [*value[:place], *value[place + 1 :]]
            case "double":
                return [*value, value[place]]
    anything = st.sampled_from((None, 0, -1, 2.5, "x", [], [None], [1]))
    return draw(st.one_of(*3 * [random_value(kind)], anything))


@st.composite
def calls(draw: Callable, name: str, schema: Any) -> dict[str, Any]:
    """Arguments by name: mostly valid ones with up to three of them changed."""
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    if draw(st.integers(0, 9)) == 0:
        return {argument: draw(random_value(kind)) for argument, kind in kinds.items()}
    values = draw(valid(name, schema))
    tensors = [argument for argument, value in values.items() if isinstance(value, Made)]
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 1, 2, 2, 3)))):
        argument = draw(st.sampled_from(sorted(values)))
        values[argument] = draw(changed_value(kinds[argument], values[argument], tensors or [argument]))
    return values
