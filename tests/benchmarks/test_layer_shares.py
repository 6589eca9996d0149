"""benchmarks.layers: the layers of a step, the work of their calls, the tables."""

import json

import pytest
import torch

from benchmarks import layers, step
from dspnet_fast.ops import conv_moments, registry

SMALL = ["--dns=w0.25,w0.50", "--image-size=32", "--batch-size=4", "--rounds=1", "--threads=1"]


@pytest.fixture
def limits(monkeypatch):
    """Limits of an imagined machine; native kernels."""
    monkeypatch.setattr(layers.machine, "peak_gflops", lambda: 100.0)
    monkeypatch.setattr(layers.machine, "copy_bandwidth", lambda footprint: 10.0)
    monkeypatch.setattr(layers, "prepare_process", lambda device: None)
    built = step.build
    monkeypatch.setattr(layers.step, "build", lambda variant, *rest: built(step.Variant(policy="native"), *rest))


def test_tables_hold_every_operator_and_the_rest_of_the_step(limits, capsys, tmp_path, policy):
    before = torch.get_num_threads()
    try:
        layers.main([*SMALL, "--rows=3", f"--json={tmp_path / 'layers.json'}"])
    finally:
        torch.set_num_threads(before)
    lines = json.loads((tmp_path / "layers.json").read_text())
    assert {line["operator"] for line in lines[-2:]} == {layers.REST, "step"}
    convolutions = [line for line in lines if line["operator"] == "conv_norm"]
    # The stem, 2 + 14 x 3 in blocks, and the last one; of two subnets and of the target.
    assert sum(line["calls"] for line in convolutions) == 3 * 46
    assert {line["kind"] for line in convolutions} == {"dense", "depthwise", "pointwise"}
    stem = next(line for line in convolutions if line["kind"] == "dense")
    assert stem["layer"] == "3>16 32x32 k3 s2" and stem["calls"] == 3
    printed = capsys.readouterr().out
    assert "conv_moments_backward pointwise" in printed and "slim_linear heads" in printed


def test_recorder_restores_the_operators(policy):
    policy("native")
    native, providers = conv_moments.native, dict(conv_moments.providers)
    recorder = layers.Recorder(lambda: 0.0)
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(8, 4, 1, 1)
    with recorder.active():
        conv_moments(x, None, None, "identity", None, weight, None, 8, 1, 0, 1, 2)
    assert conv_moments.native is native and conv_moments.providers == providers
    (key,) = recorder.calls
    flops, count = 2 * 2 * 9 * 4 * 8, 4 * (x.numel() + 2 * 8 * 9 + 4 * 8)
    assert key == layers.Key("conv_moments", layers.Work("pointwise", "4>8 3x3", flops, count))
    assert registry.get_policy() == "native"


def test_backward_counts_the_products_and_tensors_that_it_computes():
    x, y = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 3, 3)
    named = {"x": x, "y": y, "grad_y": y, "weight": torch.randn(9, 1, 3, 3), "stride": 2, "groups": 8}
    named |= {"input_gradient": True, "weight_gradient": True}
    work = layers.work_of("conv_moments_backward", named, (x,))
    assert work == layers.Work("depthwise", "8 5x5 k3 s2", 2 * 2 * y.numel() * 9, 4 * (2 * 400 + 2 * 144 + 3 * 72))
