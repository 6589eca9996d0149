"""The `Example:` blocks of the library's docstrings run and print what they show."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import dspnet_fast
from dspnet_fast import models
from dspnet_fast import nn as layers
from dspnet_fast.ops import registry

OPTIONAL = {"dspnet_fast.onnx_file": "onnxruntime"}


def library_modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(dspnet_fast.__path__, "dspnet_fast.")]
    parts = ("kernels", "train", "recipes")  # installed under the library, but not part of it
    return [name for name in names if name.split(".")[1] not in parts and not name.split(".")[-1].startswith("_C")]


@pytest.mark.parametrize("name", library_modules())
def test_examples_print_what_they_show(name, tmp_path):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    module = importlib.import_module(name)
    known = {"torch": torch, "nn": nn, "folder": tmp_path, "build": models.build}
    known |= {layer: getattr(layers, layer) for layer in layers.__all__}
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=known):
        report: list[str] = []
        failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
        assert not failed, "".join(report)


def test_every_operator_and_layer_has_an_example():
    operators = [operator for name, operator in registry.operators.items() if not name.endswith("_backward")]
    assert len(operators) >= 10
    for documented in (*operators, *(getattr(layers, name) for name in layers.__all__ if name != "ActiveSubnet")):
        assert "Example:\n" in documented.__doc__, documented
