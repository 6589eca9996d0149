"""train.compare: counted costs, runs, resuming, tables and figures."""

import io
import json
import math
import os
import shutil
import signal
from collections import Counter

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import MLP, build, family
from dspnet_fast.slim import slim
from dspnet_fast.subnets import sandwich
from tests.commands import as_arguments, run
from tests.small_run import SMALL_RUN
from train import compare, report
from train.cli import DONE, INTERRUPTED, WRONG_INPUT
from train.comparison import measuring, times
from train.comparison.curves import curves_over_seeds
from train.comparison.measuring import StepMeasurement
from train.comparison.ratios import ratios
from train.comparison.tables import figures_of, tables_of
from train.config import PretrainConfig
from train.costs.flops import PASSES, NetworkCost, expected_steps, head_macs, network_costs, run_cost
from train.evaluation import drawing
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.trainer import Trainer
from train.reporting import figures, page
from train.reporting.findings import read_comparison
from train.run.log import training_seconds

SMALL, LARGE = "c8-d1111", "c16-d1111"
OPTIONS = SMALL_RUN | {
    "dns": f"{LARGE},{SMALL}",
    "epochs": 1,
    "batch_size": 13,
    "subnets_per_step": 2,
    "warmup_epochs": 0.3,
    "probe_epochs": 0,
}


@pytest.fixture(scope="module")
def command(images):
    """command(out, **options): the command line of a comparison of two networks that train for six steps."""

    def make(out, **options):
        values = {**OPTIONS, "data": images, "k": 5, "timed_steps": 2, "out": out, **options}
        return as_arguments(values)

    return make


def constant_times(config, steps, kernels):
    return StepMeasurement(0.25, {dn: 1.0 if dn == LARGE else 0.5 for dn in config.names()}, 0.125, 3 * 2**20)


@pytest.fixture(scope="module")
def finished_comparison(command, tmp_path_factory):
    """The folder of a comparison. The family's step is timed, in another process; the others have constant times."""
    measure_step = times.measure_step

    def measured(config, steps, kernels):
        return (measure_step if len(config.names()) > 1 else constant_times)(config, steps, kernels)

    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(times, "measure_step", measured)
        assert run(compare, *command(out, linear_epochs=2)) == DONE
    return out


@pytest.fixture
def quick(monkeypatch):
    """Replace timed steps by constants and figures by one pixel."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    monkeypatch.setattr(drawing, "png", lambda draw, theme=None: file.getvalue())
    monkeypatch.setattr(times, "measure_step", constant_times)


def checkpoints(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("step-*.pt") if "evaluation" not in path.parts}


def weights(out):
    return torch.load(out / "checkpoints" / "step-00000006.pt", weights_only=True)["model"]


def test_run_cost_equals_a_calculation_by_hand():
    small, middle, large = "c8-d1111", "c8-d1121", "c16-d1121"
    config = PretrainConfig(
        recipe="paper",
        network="resnet",
        dns=f"{small},{middle},{large}",
        hidden_features=10,
        out_features=3,
        epochs=2,
        batch_size=8,
        subnets_per_step=2,
        warmup_epochs=0.5,
    )
    costs = {small: NetworkCost(100, 1000, 4), middle: NetworkCost(150, 1500, 4), large: NetworkCost(300, 3000, 5)}
    found = run_cost(config, 4, costs)
    assert found.views == 2 * 8 * 8
    # projector of the large network: 5 x 10 + 10 x 3 = 80, of the small one: 4 x 10 + 10 x 3 = 70;
    # predictor: 3 x 10 + 10 x 3 = 60
    assert found.target == 8 * 16 * (3000 + 80)
    assert found.online[small] == 6 * 16 * 3 * (1000 + 70 + 60), "untrained in the two steps of the warm-up"
    assert found.online[large] == 8 * 16 * 3 * (3000 + 80 + 60)
    assert found.online[middle] == 0, "two subnets per step are the smallest and the full one"
    projector, predictor = 50 + 20 + 30 + 3, 30 + 20 + 30 + 3
    assert found.optimizer == 8 * (6 * (300 + projector + predictor) + 2 * (300 + projector))
    assert sum(found.parts().values()) == found.target + sum(found.online.values()) + found.optimizer


def test_run_cost_of_one_network_equals_pytorchs_flop_counter():
    """Compared with forward and backward passes of a plain network with plain heads."""
    config = PretrainConfig(**{**OPTIONS, "dns": LARGE})
    hidden, out, size = config.hidden_features, config.out_features, config.image_size
    costs = network_costs(config)
    features = costs[LARGE].features
    encoder = slim(build("resnet", family("resnet", [LARGE]).full, "small"), None)
    heads = [nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)]
    heads += [nn.Linear(out, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)]
    found = run_cost(config, 1, costs)
    views = 2 * config.batch_size * config.epochs
    assert found.target == views * mac_count(nn.Sequential(encoder, *heads[:4]), size)
    plain = nn.Sequential(encoder, *heads)
    forward = mac_count(plain, size)
    assert sum(found.online.values()) == views * PASSES * forward
    with FlopCounterMode(display=False) as counter:
        plain(torch.randn(2, 3, size, size)).sum().backward()
    stem = next(module for module in plain.modules() if isinstance(module, nn.Conv2d))
    image_gradient = stem.weight.numel() * (size // stem.stride[0]) ** 2
    assert counter.get_total_flops() // 2 == 2 * (PASSES * forward - image_gradient), (
        "PyTorch skips the gradient of the images"
    )
    assert head_macs(features, hidden, out) == mac_count_of(nn.Sequential(*heads[:4]), features)
    assert parameter_count(MLP(features, hidden, out)) == parameter_count(nn.Sequential(*heads[:4])) - hidden


def mac_count_of(model, features):
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, features))
    return counter.get_total_flops() // 2


def test_expected_steps_match_sampled_subnets():
    dns = ["c8-d1111", "c8-d1112", "c16-d1112", "c16-d1122", "c16-d2222"]
    config = PretrainConfig(
        recipe="paper", network="resnet", dns=",".join(dns), epochs=4, warmup_epochs=1, subnets_per_step=4
    )
    networks = family("resnet", dns)
    drawn = Counter(subnet.name for step in range(200, 800) for subnet in sandwich(networks, 4, seed=0, step=step))
    drawn[networks.full.name] += 200
    expected = expected_steps(config, 200)
    assert expected.keys() == drawn.keys() and sum(expected.values()) == sum(drawn.values())
    assert expected[dns[0]] == 600 == drawn[dns[0]] and expected[dns[-1]] == 800 == drawn[dns[-1]]
    assert all(abs(expected[dn] - drawn[dn]) < 60 for dn in dns), "five standard deviations of 600 draws"
    small = PretrainConfig(**{**OPTIONS, "warmup_epochs": 0.5})
    assert Trainer(small, 10, torch.device("cpu")).full_only_steps == small.full_only_steps(10) == 5


def test_training_seconds_sum_the_recorded_throughput(tmp_path):
    lines = [
        {"step": 0, "knn": {}},
        {"step": 10, "images_per_second": 50.0, "data_wait": 0.5},
        {"step": 10, "knn": {}},
        {"step": 15, "images_per_second": 10.0, "data_wait": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_seconds(tmp_path, 20) == pytest.approx((4 + 10, 2 + 2))


def test_curves_are_means_and_ranges_of_the_steps_of_all_seeds(tmp_path):
    for seed, shift in (("a", 0.0), ("b", 2.0)):
        lines = [{"step": step, "loss": {LARGE: step + shift, SMALL: 0.0}} for step in range(1, 481)]
        lines += [{"step": 40, "knn": {LARGE: 0.5 + shift / 10}}, {"step": 80, "feature_std": {LARGE: 1.0}}]
        lines += [{"step": 500, "loss": {LARGE: 1.0}}] if seed == "a" else [{"step": 500, "loss": {LARGE: math.nan}}]
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves_over_seeds({"family": [tmp_path / "a", tmp_path / "b"]}, LARGE, epoch_steps=10)
    loss, knn = found["loss"]["family"], found["knn"]["family"]
    assert knn == {"epochs": [4.0], "mean": [pytest.approx(0.6)], "low": [0.5], "high": [0.7]}
    assert len(loss["mean"]) == 240 and loss["epochs"][:2] == pytest.approx([0.15, 0.35])
    assert (loss["low"][0], loss["mean"][0], loss["high"][0]) == (1.5, 2.5, 3.5)
    assert curves_over_seeds({"family": [tmp_path]}, LARGE, 10) == {}


def test_bands_reach_from_the_lowest_to_the_highest_value():
    line = {"epochs": [1, 2], "mean": [0.5, 0.6], "low": [0.4, 0.6], "high": [0.7, 0.65]}
    (axes,) = figures.bands({"alone": line, "family": line}, "kNN accuracy", percent=True)(drawing.LIGHT).axes
    band = axes.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (0.4, 0.7) and len(axes.lines) == 2


def test_ratios_equal_a_calculation_by_hand():
    def made_run(n, target, online, optimizer, data, seconds, peak):
        counted = {"target": 2 * target, "online": 2 * online, "optimizer": 2 * optimizer}
        parts = {"target": target, "online": online, "optimizer": optimizer, "data": data}
        measured = {"parts": parts, "seconds": {"seeds": seconds}, "peak_memory": peak}
        return {"subnets_per_step": n, "counted": counted, "measured": measured}

    runs = {
        "a": made_run(None, 1, 2, 1, 0, {"0": 3, "1": 5}, 100),
        "b": made_run(None, 2, 4, 1, 1, {"0": 8, "1": 8}, 200),
        "family": made_run(3, 2, 6, 1, 0, {"0": 10, "1": 8}, 210),
    }
    found = ratios(runs)
    together, largest = found["separate runs"], found["b"]
    assert together["separate runs"]["measured"]["total"] == 1 == largest["b"]["counted"]["total"]
    assert together["family"]["measured"].pop("seeds") == pytest.approx({"0": 10 / 11, "1": 8 / 13})
    assert together["family"]["measured"] == pytest.approx(
        {"total": 9 / 12, "target": 2 / 12, "online": 6 / 12, "optimizer": 1 / 12, "data": 0}
    )
    assert largest["family"]["counted"] == pytest.approx(
        {"total": 9 / 7, "target": 2 / 7, "online": 6 / 7, "optimizer": 1 / 7}
    )
    assert largest["family"]["peak_memory"] == together["family"]["peak_memory"] == 1.05
    del runs["a"]["measured"], runs["b"]["measured"]
    assert "measured" not in ratios(runs)["b"]["family"]


def test_measured_parts_of_a_step_are_separated(monkeypatch):
    """With a clock that only target, subnets and update advance."""
    clock = [0.0]

    def moves(kind, name, seconds):
        work = getattr(kind, name)

        def moving(self, *args, **options):
            clock[0] += seconds(args)
            return work(self, *args, **options)

        monkeypatch.setattr(kind, name, moving)

    moves(DSPNet, "targets", lambda args: 1)
    moves(DSPNet, "accumulate_subnet", lambda args: {SMALL: 10, LARGE: 20}[args[2].name])
    moves(FlatBuffers, "update", lambda args: 100)
    monkeypatch.setattr(measuring, "_now", lambda device: clock[0])
    found = measuring.measure_in_this_process(PretrainConfig(**OPTIONS), steps=3)
    assert (found.target, found.online, found.optimizer) == (1, {SMALL: 10, LARGE: 20}, 100)


def test_compare_writes_report_runs_and_figures(finished_comparison):
    out = finished_comparison
    found = json.loads((out / "compare.json").read_text())
    assert {path.name for path in (out / "runs").iterdir()} == {
        f"{SMALL}-seed0",
        f"{LARGE}-seed0",
        "family-n2-seed0",
    }
    assert found["steps"] == 6 and found["train_images"] == 80 and found["test_images"] == 40
    for protocol, file, column, accuracy in (
        ("kNN", "knn", "pretrained", "majority"),
        ("linear", "linear", "linear", "top1"),
    ):
        scores = found["accuracy"][protocol]
        assert list(scores) == ["alone", "family-n2"] and list(scores["alone"]) == [SMALL, LARGE]
        for place, dn, score in (
            *((f"{dn}-seed0", dn, scores["alone"][dn]) for dn in (SMALL, LARGE)),
            *(("family-n2-seed0", dn, scores["family-n2"][dn]) for dn in (SMALL, LARGE)),
        ):
            network = json.loads((out / "runs" / place / "evaluation" / f"{file}.json").read_text())["networks"][dn]
            assert score["mean"] == score["low"] == score["high"] == network[column][accuracy]
            assert score["interval"] == network[column]["interval"] > 0
    for run_ in found["runs"].values():
        measured = run_["measured"]
        assert sum(measured["parts"].values()) == pytest.approx(measured["seconds"]["mean"])
        assert all(value > 0 for value in measured["parts"].values()) and measured["peak_memory"] > 0
    configs = [
        yaml.safe_load((out / "runs" / f"{name}-seed0" / "config.yaml").read_text())
        for name in (SMALL, LARGE, "family-n2")
    ]
    different = {name for name in configs[0] if len({str(config[name]) for config in configs}) > 1}
    assert different == {"dns", "out", "subnets_per_step"}, "all other options are equal"
    text = (out / "compare.md").read_text()
    assert "| network | params | MACs | alone | family, n = 2 | family, n = 2: difference |" in text
    assert "Ratios to all separate runs together" in text and f"Ratios to {LARGE} alone" in text
    assert {path.name for path in out.glob("*.png")} == {
        *("compare-accuracy-knn.png", "compare-accuracy-linear.png"),
        *("compare-cost-measured.png", "compare-cost-counted.png", "compare-curves-loss.png"),
    }


def test_finished_runs_and_measurements_are_not_repeated(finished_comparison, command, tmp_path, quick):
    out = shutil.copytree(finished_comparison, tmp_path / "out")
    before = checkpoints(out)
    again = command(out, seeds="0,1", subnets_per_step="2")
    assert run(compare, *again) == DONE
    after = checkpoints(out)
    assert {path: after[path] for path in before} == before and len(after) == 2 * len(before)
    found = json.loads((out / "compare.json").read_text())
    score = found["accuracy"]["kNN"]["family-n2"][LARGE]
    assert list(score["seeds"]) == ["0", "1"]
    values = [seed["accuracy"] for seed in score["seeds"].values()]
    assert score["mean"] == pytest.approx(sum(values) / 2) and (score["low"], score["high"]) == (
        min(values),
        max(values),
    )
    assert "Means of seeds 0, 1" in (out / "compare.md").read_text()
    measured = json.loads((finished_comparison / "compare.json").read_text())["runs"]["family-n2"]["measured"]
    assert found["runs"]["family-n2"]["measured"]["timed_step"] == measured["timed_step"], "not measured again"


def test_interrupted_comparison_continues_with_the_same_weights(
    finished_comparison, command, tmp_path, monkeypatch, quick, capsys
):
    out = tmp_path / "out"
    step = Trainer.train_step

    def interrupted(self, batch):
        if len(self.model.family) == 2 and self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run(compare, *command(out)) == INTERRUPTED
    assert "error: interrupted; the same command continues from what was saved" in capsys.readouterr().err
    assert not (out / "compare.json").exists()
    assert (out / "runs" / "family-n2-seed0" / "checkpoints" / "step-00000004.pt").exists()
    assert run(compare, *command(out)) == DONE
    for name in ("family-n2-seed0", f"{SMALL}-seed0"):
        straight = weights(finished_comparison / "runs" / name)
        torch.testing.assert_close(weights(out / "runs" / name), straight, rtol=0, atol=0)
    found = json.loads((out / "compare.json").read_text())
    measured = found["runs"]["family-n2"]["measured"]
    # 6 steps, of which the first 2, the warm-up, train only the full network
    target, online, optimizer = 6 * 0.25, 4 * 0.5 + 6 * 1.0, 6 * 0.125
    compute = measured["seconds"]["mean"] - measured["parts"]["data"]
    assert measured["parts"]["online"] == pytest.approx(compute * online / (target + online + optimizer))
    assert measured["timed_over_recorded"] == pytest.approx((target + online + optimizer) / compute)
    before = checkpoints(out)
    assert run(compare, *command(out, base_lr=1.0)) == WRONG_INPUT
    assert "has another --base-lr" in capsys.readouterr().err and checkpoints(out) == before


def test_no_separate_runs_trains_families_only(command, tmp_path, quick, policy):
    """With --fast-kernels all runs have the kernels that were chosen once for the comparison."""
    out = tmp_path / "out"
    dns = f"{SMALL},c16-d1112,c16-d1122"
    argv = [*command(out, subnets_per_step="3,2", dns=dns), "--no-separate-runs", "--fast-kernels"]
    assert run(compare, *argv) == DONE
    assert {path.name for path in (out / "runs").iterdir()} == {"family-n2-seed0", "family-n3-seed0"}
    found = read_comparison(out)
    assert list(found["accuracy"]["kNN"]) == ["family-n2", "family-n3"]
    n2, n3 = (found["ratios"]["separate runs"][name] for name in ("family-n2", "family-n3"))
    assert "measured" not in n2 and 0 < n2["counted"]["total"] < n3["counted"]["total"]
    assert "difference" not in (out / "compare.md").read_text()
    chosen = {(folder / "kernels.json").read_text() for folder in (out, *(out / "runs").iterdir())}
    assert len(chosen) == 1 and "too short for a race" in chosen.pop()


def test_networks_that_are_not_pretrained_alone_have_no_results(finished_comparison, command, tmp_path, quick):
    out = shutil.copytree(finished_comparison, tmp_path / "out")
    assert run(compare, *command(out, separate=LARGE)) == DONE
    found = read_comparison(out)
    assert list(found["accuracy"]["kNN"]["alone"]) == [LARGE] and "measured" not in found["runs"][SMALL]
    accuracy = tables_of(found)[0]
    small, large = ([row[3], row[5]] for row in accuracy.rows)
    assert small == ["–", "–"] and large[1].endswith(" points")
    assert list(found["curves"]["loss"]) == [LARGE, "family-n2"]
    assert "measured" not in found["ratios"]["separate runs"]["family-n2"]
    assert "measured" in found["ratios"][LARGE]["family-n2"]
    draws = {name: draw(drawing.LIGHT).axes[0] for name, draw, *_ in figures_of(found)}
    rows = [label.get_text() for label in draws["cost-measured"].get_yticklabels()]
    assert rows == [f"{LARGE} alone", "family, n = 2"]
    assert {text.get_text() for text in draws["accuracy-knn"].texts} == {SMALL, LARGE}


def test_report_of_a_run_contains_its_comparison(finished_comparison, tmp_path, quick):
    out = shutil.copytree(finished_comparison, tmp_path / "out") / "runs" / "family-n2-seed0"
    assert run(report, out) == DONE
    html = (out / "report" / "index.html").read_text()
    found = read_comparison(out)
    tables = tables_of(found)
    assert len(tables) == 6 and all(page.table(table.heading, table.rows) in html for table in tables)
    drawn = {path.name for path in (out / "report").glob("compare-*.png")}
    assert drawn == {f"compare-{name}.png" for name, *_ in figures_of(found)} and len(drawn) == 5
    assert html.count("pretrained alone and in a family") >= 4 and "Not compared yet" not in html
    alone, family_ = (found["accuracy"]["kNN"][column][LARGE] for column in ("alone", "family-n2"))
    row = tables[0].rows[1]
    assert row[0] == LARGE and row[3] == f"{alone['mean']:.1%} ± {alone['interval']:.1%}"
    assert row[5] == f"{100 * (family_['mean'] - alone['mean']):+.1f} points"


def test_bars_stack_their_parts():
    rows = {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 4.0, "z": 0.5}}
    (axes,) = figures.bars(rows, "seconds")(drawing.LIGHT).axes
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert ends == [1, 0, 3, 4, 3, 4.5] and axes.get_xlabel() == "seconds"
    assert [text.get_text() for text in axes.texts] == ["3", "4.5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dns": SMALL}, "two networks or more"),
        ({"seeds": "0,0"}, "--seeds 0,0: give different numbers of at least 0"),
        ({"seeds": "a"}, "--seeds must be a number or several"),
        ({"subnets_per_step": "1,2"}, "--subnets-per-step 1,2: give different numbers of at least 2"),
        ({"subnets_per_step": "2,3"}, "have the same effect on 2 networks"),
        ({"separate": "w1.00"}, "no subnet 'w1.00' in this family"),
        ({"k": 0}, "--k must be at least 1"),
        ({"k": 81}, "--k 81 neighbours among"),
        ({"references": 500}, "--references 500 of 80 images"),
        ({"linear_epochs": -1}, "--linear-epochs must be at least 0, not -1"),
        ({"train_images": 500}, "--train-images 500"),
        ({"batch_size": 500}, "batch of 500"),
        ({"data": "/nowhere"}, "no image dataset"),
        ({"out": ""}, "--out is missing"),
        ({"tau": 1.5}, "--tau must lie between 0 and 1"),
    ],
)
def test_invalid_options_are_refused_before_writing(command, tmp_path, capsys, options, message):
    assert run(compare, *command(**{"out": tmp_path / "out", **options})) == WRONG_INPUT
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_timing_process_loads_the_plugins_and_names_its_failure(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("raise RuntimeError('the plugin was loaded')")
    with pytest.raises(
        RuntimeError, match="a training step could not be timed: .* RuntimeError: the plugin was loaded"
    ):
        measuring.measure_step(PretrainConfig(**OPTIONS, plugins=str(plugin)), steps=1)


def test_help_has_an_example_and_the_comparisons_options(capsys):
    assert run(compare, "--help") == DONE
    shown = capsys.readouterr().out
    assert "examples:" in shown and "--subnets-per-step" in shown and "--seed " not in shown
