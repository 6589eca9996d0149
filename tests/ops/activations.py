"""Activation functions and sizes of activations for the tests of norm_act and norm_act_pool."""

import pytest
import torch
import torch.nn.functional as F
from harness import SLOW_INTERPRETED

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}

# (images, channels, height, width, views)
CASES = {
    "one vector": (4, 16, 6, 5, 2),
    "odd channels": (6, 13, 7, 5, 3),
    "wide": (4, 200, 5, 6, 2),
    "wide, small maps": (64, 250, 3, 3, 2),
    "1x1 maps": (6, 72, 1, 1, 2),
    "large": (4, 40, 23, 21, 2),
    "one channel": (2, 1, 3, 3, 1),
    "one image": (1, 35, 9, 7, 1),
}
# The case of many images tests the threads of a CPU.
NAMES = [pytest.param(name, marks=SLOW_INTERPRETED if name == "wide, small maps" else []) for name in CASES]

# Changes that make arguments of "one vector" invalid.
REFUSED = {
    "x of three dimensions": lambda a: {"x": a["x"][0]},
    "integers": lambda a: {"x": a["x"].int()},
    "an unknown activation": lambda a: {"act": "mish"},
    "scale without shift": lambda a: {"shift": None},
    "scale of other channels": lambda a: {"scale": a["scale"][:, 1:]},
    "rows that do not divide the batch": lambda a: {"scale": torch.ones(3, 16), "shift": torch.ones(3, 16)},
}
