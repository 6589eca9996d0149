"""benchmarks.step: counted work, checks of the first step, output."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from benchmarks import quiet, step, work
from benchmarks.memory import MIB, peak_of_step
from dspnet_fast.errors import InputError

SMALL = ["--network=resnet", "--dns=c8-d1111,c12-d1111,c16-d1111", "--stem=small", "--image-size=12", "--batch-size=4"]
TINY = [*SMALL, "--quick", "--rounds=2", "--rows=3"]


@pytest.fixture
def hasty(monkeypatch):
    """Skip waiting, separate processes and measured limits; use native kernels."""
    monkeypatch.setattr(quiet, "other_load", lambda: 0.0)
    monkeypatch.setattr(step, "in_own_process", lambda module, arguments: {"peak_MiB": 2.0})
    monkeypatch.setattr(step.machine, "peak_gflops", lambda: 100.0)
    monkeypatch.setattr(work, "roofline_seconds", lambda flops, count, footprint: flops / 1e11)
    monkeypatch.setitem(step.VARIANTS, step.OURS, step.Variant(policy="native"))
    monkeypatch.setitem(step.VARIANTS, step.OURS_BF16, step.Variant(policy="native", precision="bf16"))


def test_output_ends_with_the_machine_readable_line(hasty, capsys, tmp_path, policy):
    step.main([*TINY, f"--json={tmp_path / 'step.json'}"])
    printed = capsys.readouterr().out
    number = r"\d+\.\d\d"
    line = (
        rf"step_speedup_vs_eager_channels_last={number} vs_eager_default={number} peak_memory_ratio=1\.000 "
        rf"bf16_speedup={number} no_flag_speedup={number}"
    )
    assert re.fullmatch(line, printed.splitlines()[-1])
    assert "compile s" not in printed
    results = json.loads((tmp_path / "step.json").read_text())
    timed = {name for name, variant in step.VARIANTS.items() if variant.quick and not variant.compiled}
    assert set(results["variants"]) == timed
    for name in (*timed, "x same", "GFLOP/s", "share"):
        assert name in printed
    assert len(results["profile"]) == 4
    assert sum(row["share"] for row in results["profile"]) == pytest.approx(1)


def test_summary_compares_with_the_fastest_plain_variants():
    results = {
        "eager channels_last": {"ms": 200, "peak_MiB": 50},
        "eager channels_last, views stacked": {"ms": 180, "peak_MiB": 80},
        "eager default layout": {"ms": 300, "peak_MiB": 40},
        "eager bf16 autocast": {"ms": 150, "peak_MiB": 30},
        "ours": {"ms": 100, "peak_MiB": 20},
        "ours bf16": {"ms": 60, "peak_MiB": 10},
        "ours without --fast-kernels": {"ms": 90, "peak_MiB": 50},
    }
    assert step.summary(results) == (
        "step_speedup_vs_eager_channels_last=1.80 vs_eager_default=3.00 peak_memory_ratio=0.400 bf16_speedup=2.50 "
        "no_flag_speedup=2.00"
    )
    results["eager torch.compile"] = {"ms": 90, "peak_MiB": 45}
    assert step.summary(results).startswith("step_speedup_vs_eager_channels_last=0.90 vs_eager_default=3.00")


def test_compile_seconds_are_a_column(hasty, capsys, monkeypatch, policy):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    step.main([*TINY, "--compile"])
    printed = capsys.readouterr().out
    assert "compile s" in printed and "eager torch.compile" in printed


def test_compiled_step_that_is_wrong_is_left_out_with_the_reason(hasty, capsys, monkeypatch, tmp_path, policy):
    def compile(function, dynamic):
        def wrong(*arguments):
            return tree_map(lambda output: output * float("nan"), function(*arguments))

        return wrong

    monkeypatch.setattr(torch, "compile", compile)
    step.main([*TINY, "--compile", f"--json={tmp_path / 'step.json'}"])
    printed = capsys.readouterr().out
    assert "compile s" not in printed and re.search(
        r"torch\.compile is left out: the loss of c8-d1111\s+is nan", printed
    )
    assert "eager torch.compile" not in json.loads((tmp_path / "step.json").read_text())["variants"]


@pytest.mark.parametrize("wrong", ["losses", "updates"])
@pytest.mark.parametrize("name", [step.OURS, step.NO_FLAG, f"{step.NO_FLAG}, bf16"])
def test_different_first_step_is_an_error_without_output(name, wrong, hasty, capsys, monkeypatch, policy):
    def build(variant, *rest):
        run = made(variant, *rest)
        if variant != step.VARIANTS[name]:
            return run

        def other():
            losses = run.step()
            if wrong == "losses":
                return {name: loss * 1.02 for name, loss in losses.items()}
            with torch.no_grad():
                run.weights["encoder.layer3.0.conv1.weight"].mul_(1.001)
            return losses

        return step.Run(other, run.weights)

    made = step.build
    monkeypatch.setattr(step, "build", build)
    with pytest.raises(SystemExit, match=f"error: {name}: the .* Nothing is timed"):
        step.main(TINY)
    assert capsys.readouterr().out == ""


def first_step(losses, updates=(("weight", 1.0),)):
    return step.FirstStep(losses, {name: torch.tensor([update]) for name, update in updates}, 1.0)


def test_first_steps_may_differ_by_rounding_but_not_miss_losses():
    baseline = first_step({"w": 1.0})
    assert step.problem("fp32", first_step({"w": 1.0005}, [("weight", 1.01)]), baseline) is None
    assert step.problem("bf16", first_step({"w": 1.005}, [("weight", 1.6)]), baseline) is None
    for losses in ({"w": 1.005}, {"w": float("nan")}, {"v": 1.0}, {}):
        assert step.problem("fp32", first_step(losses), baseline)
    for update in (1.6, -1.0, float("nan")):
        assert step.problem("fp32", first_step({"w": 1.0}, [("weight", update)]), baseline)


@pytest.mark.parametrize("name", ["eager channels_last", "ours native"])
def test_every_step_trains_the_given_subnets(name, policy):
    options = step.make_parser().parse_args([*SMALL, "--subnets=c16-d1111,c8-d1111"])
    run = step.build(step.VARIANTS[name], options, step.images(options))
    assert [set(run.step()) for _ in range(3)] == 3 * [{"c8-d1111", "c16-d1111"}]


@pytest.mark.parametrize("subnets", ["c8-d1111,c12-d1111", "c8-d1111,c16-d2111"])
def test_subnets_must_be_in_the_family_and_include_the_full_network(subnets):
    with pytest.raises(InputError, match="c16-d"):
        step.main([*TINY, f"--subnets={subnets}"])


@pytest.mark.parametrize("groups", [1, 8])
def test_recorded_work_of_convolution_and_matrix_product(groups):
    x = torch.randn(2, 8, 6, 6).requires_grad_()
    weight, matrix = torch.randn(8, 8 // groups, 3, 3).requires_grad_(), torch.randn(5, 8)

    def run():
        F.linear(F.conv2d(x, weight, padding=1, groups=groups).mean((2, 3)), matrix).sum().backward()

    forward, product, *_, backward = layers = work.record(run)
    macs = 2 * 8 * 36 * 9 * 8 // groups
    assert (forward.flops, backward.flops) == (2 * macs, 4 * macs)
    assert product.flops == 2 * 2 * 5 * 8 and len(layers) == 4  # the matrix has no gradient
    assert forward.bytes == 4 * (2 * x.numel() + weight.numel())
    assert backward.bytes == 4 * (4 * x.numel() + 2 * weight.numel())


def test_peak_memory_counts_simultaneously_live_tensors():
    def build():
        kept = torch.ones(4 * MIB // 4)

        def run():
            for _ in range(3):
                kept.add(1)  # 4 MiB each time, freed at once

        torch.ones(64 * MIB // 4)  # freed before the step
        return run

    assert 8 * MIB <= peak_of_step(build) < 9 * MIB


def test_relative_half_iqr():
    assert quiet.relative_half_iqr([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    assert quiet.relative_half_iqr([1.0]) == 0


def test_interleave_takes_a_sample_of_every_variant_in_each_round_in_changing_orders(monkeypatch):
    monkeypatch.setattr(quiet, "other_load", lambda: 0.0)
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = quiet.interleave(variants, 12, quiet.QuietWait(1, 1), lambda name: None)
    assert all(len(seconds) == 12 for seconds in samples.values())
    rounds = ["".join(order[start : start + 3]) for start in range(0, 36, 3)]
    assert all(sorted(names) == [*"abc"] for names in rounds) and len({*rounds}) > 3


def test_quiet_wait_is_limited(monkeypatch):
    monkeypatch.setattr(quiet, "other_load", lambda: 1.0)
    quiet.QuietWait(0.05, 10).wait()
    quiet.QuietWait(10, 0.05).wait()
