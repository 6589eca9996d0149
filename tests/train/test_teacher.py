"""Training with a frozen teacher: losses in float64, targets, micro-batches, ranks, resume, cache, graphs and costs."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.nn import activate
from tests.commands import as_arguments, run
from tests.interruption import check_resume, stop_after
from tests.small_run import SMALL_RUN
from train import compare
from train.comparison import times
from train.comparison.measuring import StepMeasurement, measure_in_this_process
from train.costs.flops import TeacherCost, network_costs, run_cost
from train.export import ExportOptions, export
from train.pretrain import _main
from train.pretraining import cuda_graphs
from train.pretraining.cuda_graphs import CapturedFunction
from train.pretraining.dspnet import DSPNet, Taught
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer
from train.selection.recording import calls_of, shape_of
from train.teachers.cache import CachedFeatures
from train.teachers.live import LiveFeatures
from train.teachers.targets import RIDGE, TeacherTargets, measure_whitening
from train.teachers.teacher import FACTS, Teacher, expected_facts, open_teacher, with_teacher, without_teacher

NAMES = ["c8-d1111", "c8-d2111", "c16-d2111"]
TAUGHT = 12
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def make(self_weight, **options):
    torch.manual_seed(0)
    model = DSPNet(
        "resnet", family("resnet", NAMES), "small", 32, 16, teacher_features=TAUGHT, self_weight=self_weight, **options
    ).double()
    for parameter in model.target.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    images, features = torch.randn(8, 3, 16, 16).double(), torch.randn(8, TAUGHT).double() + 3
    return model, images, TeacherTargets(lambda step, batch: Taught(features))(0, images), features


def gradients(model):
    return {name: p.grad for name, p in model.online.named_parameters() if p.grad is not None}


def cosine_distance(p, z):
    return 2 - 2 * F.cosine_similarity(p, z)


@pytest.mark.parametrize("self_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_the_written_out_formula(self_weight):
    model, images, taught, features = make(self_weight, momentum_bn="off")
    dn, twin = model.family[1], copy.deepcopy(model)
    losses = model.accumulate(images, [dn], taught=taught)

    expected = torch.zeros((), dtype=torch.float64)
    with activate(twin.online, dn):
        encoded = [twin.online.encoder(view) for view in images.chunk(2)]
        predicted = [twin.online.teacher_head(view) for view in encoded]
        for prediction, feature in zip(predicted, features.chunk(2)):  # the same view, centred over both
            expected = expected + cosine_distance(prediction, feature - features.mean(0)).mean()
        if self_weight:
            p1, p2 = (twin.online.predictor(twin.online.projector(view)) for view in encoded)
            with torch.no_grad():
                z1, z2 = (twin.target.projector(twin.target.encoder(view)) for view in images.chunk(2))
            expected = expected + self_weight * (cosine_distance(p1, z2) + cosine_distance(p2, z1)).mean()
    expected.backward()
    torch.testing.assert_close(losses[dn.name], expected.detach())
    assert gradients(model).keys() == gradients(twin).keys()
    torch.testing.assert_close(gradients(model), gradients(twin))


@pytest.mark.parametrize("self_weight", [0.0, 0.5])
def test_accumulated_gradients_equal_those_of_the_summed_loss(self_weight):
    model, images, taught, _ = make(self_weight)
    twin = copy.deepcopy(model)
    losses = model.accumulate(images, list(model.family), alpha=0.6, taught=taught)
    targets = twin.targets(images, alpha=0.6)
    total = sum(twin.loss(images, targets, dn, taught) for dn in twin.family)
    total.backward()
    torch.testing.assert_close(sum(losses.values()), total.detach())
    torch.testing.assert_close(gradients(model), gradients(twin))


def test_without_self_weight_the_target_computes_nothing():
    model, images, taught, _ = make(0.0)
    assert model.online.projector is model.online.predictor is model.target.projector is None
    model.target.encoder.forward = None  # calling it would fail
    assert model.targets(images).shape == (0, 0)
    model.accumulate(images, list(model.family), taught=taught)


def test_whitened_targets_are_uncorrelated_with_equal_variances_up_to_the_ridge():
    torch.manual_seed(0)
    features = torch.randn(500, 6) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 0.5])) @ torch.randn(6, 6) + 4
    mean, matrix = measure_whitening(features.split(100))
    torch.testing.assert_close(mean, features.mean(0))
    covariance = torch.cov(features.T.double(), correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    ridge = RIDGE * values.mean()
    targets = TeacherTargets(lambda step, batch: Taught(features), whitening=(mean, matrix))(0, features)
    white = targets.features.double()
    expected = vectors @ torch.diag(values / (values + ridge)) @ vectors.T
    torch.testing.assert_close(torch.cov(white.T, correction=0), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="same features for all images"):
        measure_whitening([torch.ones(3, 2)])
    with pytest.raises(InputError, match="features of some images are not finite"):
        measure_whitening([torch.randn(3, 2), torch.tensor([[float("nan"), 0.0]])])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model("test_efficientnet", pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def taught(small, weights):
    """taught(**options): the configuration of a small run with a teacher."""

    def configuration(**options):
        source = {"teacher": f"timm:test_efficientnet={weights}", "teacher_size": 32, "probe_epochs": 0}
        return small(**{**source, **options})

    return configuration


def test_verdict_shows_the_teacher(taught, tmp_path):
    PretrainRun(taught(epochs=1, warmup_epochs=0, probe_epochs=1), resume=False).run()
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert all(" than the teacher (" in line or " from the teacher (" in line for line in verdict["details"][1:])
    assert "the teacher" not in verdict["conclusion"]


def trainer_of(config, teacher=None):
    config = copy.copy(config)
    teacher = teacher or open_teacher(config, CPU)
    config.teacher_features = teacher.facts.features
    trainer = Trainer(config, 10, CPU)
    trainer.teacher = TeacherTargets(LiveFeatures(teacher, CPU, config.grad_accum_steps))
    return trainer


def views(config):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2 * config.batch_size, 3, 12, 12), dtype=torch.uint8, generator=generator)


def test_centre_is_that_of_the_whole_batch_with_micro_batches(taught):
    whole, parts = trainer_of(taught(bn_groups=2)), trainer_of(taught(bn_groups=2, grad_accum_steps=2))
    batch = views(whole.config)
    torch.testing.assert_close(parts.teacher(0, batch).features, whole.teacher(0, batch).features)
    assert whole.teacher(0, batch).features.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(parts.train_step(batch), whole.train_step(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.flat_buffers.params, whole.flat_buffers.params, rtol=1e-4, atol=1e-4)


def test_centre_is_that_of_all_ranks():
    features = torch.randn(2, 6, TAUGHT).double()

    class Ranks:
        def all_reduce_mean(self, tensor):
            torch.testing.assert_close(tensor, features[0].mean(0))
            tensor.copy_(features.mean((0, 1)))

    found = TeacherTargets(lambda step, batch: Taught(features[0]), Ranks())(0, features[0]).features
    torch.testing.assert_close(found, features[0] - features.flatten(0, 1).mean(0))


def run_and_return(functions):
    for function in functions:
        function()
    return list(functions)


@pytest.mark.parametrize("self_weight", [0.0, 0.5])
def test_captured_steps_equal_launched_steps(taught, self_weight):
    config = taught(self_weight=self_weight)
    teacher = open_teacher(config, CPU)
    plain, captured = trainer_of(config, teacher), trainer_of(config, teacher)
    flat = captured.flat_buffers
    captured.accumulate = cuda_graphs.captured(captured.model, flat, captured._alpha, run_and_return)
    captured.teacher._source._outputs = CapturedFunction(teacher.outputs, run_and_return)
    for index in range(2):
        batch = views(config) + index
        torch.testing.assert_close(captured.train_step(batch), plain.train_step(batch), rtol=0, atol=0)
    torch.testing.assert_close(flat.params, plain.flat_buffers.params, rtol=0, atol=0)


def test_nonfinite_features_are_skipped_and_found(taught):
    trainer = trainer_of(taught())
    before = trainer.flat_buffers.params.clone()
    trainer.teacher = TeacherTargets(lambda step, batch: Taught(torch.full((len(batch), 256), float("nan"))))
    trainer.train_step(views(trainer.config))
    assert trainer.guard.skipped().total == 1 and torch.equal(trainer.flat_buffers.params, before)
    assert trainer.diagnose(views(trainer.config)).subnet == "teacher"


@pytest.mark.parametrize(("cached", "target"), [(False, "whitened"), (True, "centred")], ids=["live", "cached"])
def test_resume_is_exact(taught, tmp_path, cached, target):
    cache = {"teacher_cache": str(tmp_path / "cache")} if cached else {}
    options = {"teacher_target": target, "self_weight": 0.5 if cached else 0.0, **cache}
    weights = check_resume(taught, tmp_path, **options)["model"]
    assert not any("teacher" in name and "head" not in name for name in weights), "weights of the teacher"


def test_resume_with_another_teacher_is_refused(taught, tmp_path, weights):
    stop_after(taught(), 1)
    state = timm.create_model("test_efficientnet", pretrained=False).state_dict()
    save_file(state, tmp_path / "other.safetensors")
    out = ["--resume", "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match="was begun with a teacher of weights"):
        _main([*out, "--teacher", f"timm:test_efficientnet={tmp_path / 'other.safetensors'}"])
    moved = weights.rename(weights.with_name("moved.safetensors"))
    try:
        _main([*out, "--teacher", f"timm:test_efficientnet={moved}"])  # the same weights elsewhere
    finally:
        moved.rename(weights)


def test_cached_features_are_those_of_the_image_or_of_its_mirror_image(taught, tmp_path):
    config = taught(teacher_cache=str(tmp_path / "cache"), out=str(tmp_path / "first"))
    first = PretrainRun(config, resume=False)
    source, sampler = first.trainer.teacher._source, first._sampler()
    assert isinstance(source, CachedFeatures)
    rows = [array for array in source._rows]
    teacher = first.teacher
    from train.data.loader import evaluation_batches
    from train.data.normalization import normalize
    from train.data.views.augmentation import byol, sample_view, uniform_numbers

    batch = next(iter(evaluation_batches(first.images, range(80), 32, 80, 0)))
    torch.testing.assert_close(rows[0], teacher.features(normalize(batch)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], teacher.features(normalize(batch.flip(3))), rtol=1e-4, atol=1e-4)
    for step in (3, 12):
        found = source(step, torch.empty(0)).features.chunk(2)
        for k, spec in enumerate(byol(config.image_size, config.min_scale)):
            for (epoch, index), row in zip(sampler.batch(step), found[k]):
                parameters = sample_view(spec, uniform_numbers(config.seed, epoch, index)[k], 16, 16)
                torch.testing.assert_close(row, rows[parameters.flip][index])


def test_cache_has_no_features_of_mirror_images_without_flips(taught, tmp_path):
    config = taught(teacher_cache=str(tmp_path / "cache"), flip_probability=0.0)
    run = PretrainRun(config, resume=False)
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert file.name.startswith("view-") and run.teacher.facts.cost(config, 80).cached_views == 80
    source, indices = run.trainer.teacher._source, [index for _, index in run._sampler().batch(2)]
    torch.testing.assert_close(source(2, torch.empty(0)).features, source._rows[0][indices * 2])


def test_cache_is_shared_by_runs_with_this_teacher(taught, tmp_path):
    options = {"teacher_cache": str(tmp_path / "cache"), "epochs": 1}
    PretrainRun(taught(**options), resume=False)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")}
    assert sorted(path.name.split("-")[0] for path in files) == ["mirror", "view"]
    PretrainRun(taught(out=str(tmp_path / "second"), **options), resume=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")} == files


def test_features_that_are_not_finite_are_not_cached(taught, tmp_path, monkeypatch):
    features = Teacher.features
    monkeypatch.setattr(Teacher, "features", lambda self, images: features(self, images) / (images[:, :1, 0, 0] > 0))
    with pytest.raises(InputError, match=r"not finite, among the 64 images from .*blobs.000.png on"):
        PretrainRun(taught(teacher_cache=str(tmp_path / "cache")), resume=False)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_interrupted_cache_continues_after_its_last_batch(taught, tmp_path, monkeypatch):
    options = {"teacher_cache": str(tmp_path / "cache"), "epochs": 1, "warmup_epochs": 0}
    features, seen = Teacher.features, []

    def counted(self, images):
        seen.append(len(images))
        if len(seen) == 3:  # of the second batch
            raise KeyboardInterrupt
        return features(self, images)

    monkeypatch.setattr(Teacher, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        PretrainRun(taught(out=str(tmp_path / "stopped"), **options), resume=False)
    continued = PretrainRun(taught(**options), resume=False).trainer.teacher._source._rows
    assert seen == [64, 64, 16, 16, 16], "images and mirror images"
    whole = PretrainRun(
        taught(**options | {"out": str(tmp_path / "whole"), "teacher_cache": str(tmp_path / "again")}), resume=False
    )
    assert all(torch.equal(*pair) for pair in zip(continued, whole.trainer.teacher._source._rows))


@pytest.mark.parametrize("damage", [lambda data: data[:300], lambda data: b"text"], ids=["cut", "text"])
def test_damaged_cache_is_refused(taught, tmp_path, damage):
    options = {"teacher_cache": str(tmp_path / "cache"), "epochs": 1}
    PretrainRun(taught(**options), resume=False)
    for path in (tmp_path / "cache").glob("*.npy"):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="is damaged .*: delete it to compute it again"):
        PretrainRun(taught(out=str(tmp_path / "second"), **options), resume=False)


def test_cache_that_cannot_be_written_is_refused_before_the_run_begins(taught, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="--teacher-cache: .*file is not a folder"):
            PretrainRun(taught(teacher_cache=str(folder)), resume=False)
    assert not (tmp_path / "run").exists()


def test_run_whose_teacher_is_not_finite_for_some_images_names_the_teacher(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "outputs", lambda self, images: Taught(torch.full((len(images), 256), torch.nan)))
    with pytest.raises(
        InputError, match="first in the features of teacher .*: check these, or choose another --teacher"
    ):
        PretrainRun(taught(), resume=False).run()


def test_cache_is_computed_by_one_process_at_a_time(taught, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    program = "import sys, pathlib, train.run.lock as l; l.lock(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(cache.resolve() / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match="is writing to the features in .*or choose another --teacher-cache"):
            PretrainRun(taught(teacher_cache=str(cache)), resume=False)
    finally:
        other.communicate(b"\n")


def test_run_states_its_teacher_and_so_does_every_export(taught, tmp_path, capsys):
    config = taught(epochs=1, warmup_epochs=0)
    PretrainRun(config, resume=False).run()
    assert "teacher  test_efficientnet, 256 features of views at 32 px, apache-2.0" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / FACTS).read_text())
    assert facts["sha256"] == open_teacher(config, CPU).facts.sha256 and facts["licence"] == "apache-2.0"
    (folder,) = export(tmp_path / "run", ["c8-d1111"], ExportOptions())
    stated = json.loads((folder / "manifest.json").read_text())["teacher"]
    network, _, file = config.teacher.partition("=")
    assert stated == facts | {"source": f"{network}={Path(file).name}"}, "no path of this machine"


def test_accuracy_of_the_teacher_is_printed_before_the_first_step(taught, tmp_path):
    run = PretrainRun(taught(epochs=1, probe_epochs=1), resume=False)
    run.run()
    (line,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "knn  teacher" in line]
    accuracy = run.probe.accuracy(run.teacher.features)
    assert f"step 0  knn  teacher {accuracy:.3f}" in line


def test_accuracy_of_a_teacher_with_features_on_disk_is_that_at_its_size(taught, tmp_path, monkeypatch):
    run = PretrainRun(taught(epochs=1, probe_epochs=1, teacher_cache=str(tmp_path / "cache")), resume=False)
    shapes = []
    monkeypatch.setattr(run.teacher, "features", lambda images: shapes.append(images.shape) or images.flatten(1))
    assert run._teacher_accuracy is not None
    assert {shape[2:] for shape in shapes} == {(32, 32)}


def test_export_of_a_run_without_a_teacher_says_so(trained):
    (folder,) = export(trained, ["c8-d1111"], ExportOptions())
    assert json.loads((folder / "manifest.json").read_text())["teacher"] is None


@pytest.mark.parametrize("self_weight", [0.0, 0.5])
def test_selection_knows_the_operators_of_a_run_with_a_teacher(taught, self_weight):
    config = with_teacher(taught(self_weight=self_weight), expected_facts(taught()))
    shapes = {call.arguments[0].shape for call in calls_of(config) if call.operator == "normalized_mse"}
    assert shapes == {(16, 256), *([(16, config.out_features)] if self_weight else [])}
    assert shape_of(config, 1)["teacher_features"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_weight": 0.5}, "--self-weight needs --teacher"),
        ({"teacher_cache": "cache"}, "--teacher-cache needs --teacher"),
        ({"teacher": "x", "self_weight": 1.5}, "--self-weight must lie between 0 and 1"),
        ({"teacher": "x", "teacher_size": 0}, "--teacher-size must be at least 1"),
        ({"teacher": "x", "teacher_target": "raw"}, "--teacher-target must be one of centred, whitened"),
    ],
)
def test_invalid_options_are_refused(small, options, message):
    with pytest.raises(InputError, match=message):
        small(**options)


def test_cost_of_the_teacher_is_a_part_of_its_own(small):
    plain = small()
    costs = network_costs(plain)
    alone = run_cost(plain, 10, costs)
    live = run_cost(small(teacher="x", teacher_features=5, self_weight=0.5), 10, costs, TeacherCost(1000, 5))
    assert live.parts()["teacher"] == live.views * 1000 and "teacher" not in alone.parts()
    assert live.target == alone.target and live.optimizer > alone.optimizer
    head = {dn: costs[dn].features * 5 for dn in costs}
    for dn, macs in live.online.items():
        assert macs == pytest.approx(alone.online[dn] + alone.online[dn] / self_macs(plain, costs[dn]) * head[dn])
    only = run_cost(small(teacher="x", teacher_features=5), 10, costs, TeacherCost(1000, 5, cached_views=160))
    assert only.target == 0 and only.parts()["teacher"] == 2 * 80 * 1000
    assert sum(only.online.values()) < sum(live.online.values())


def self_macs(config, cost):
    hidden, out = config.hidden_features, config.out_features
    return cost.macs + cost.features * hidden + hidden * out + 2 * out * hidden


def test_dry_run_shows_the_teacher_and_reads_no_weights(taught, capsys):
    config = taught(out="")
    arguments = [f"--{name}={getattr(config, name.replace('-', '_'))}" for name in ("data", "network", "dns", "stem")]
    _main(
        [*arguments, "--image-size=12", "--teacher=timm:test_efficientnet=missing.pth", "--batch-size=8", "--dry-run"]
    )
    shown = capsys.readouterr().out
    assert "teacher       " in shown and "test_efficientnet" in shown


def test_comparison_has_three_arms_and_the_teacher_as_a_part(images, weights, tmp_path, monkeypatch):
    def measured(config, steps, kernels):
        teacher = 0.0 if config.teacher is None else 0.5
        return StepMeasurement(0.25, dict.fromkeys(config.names(), 1.0), 0.125, 2**20, teacher)

    monkeypatch.setattr(times, "measure_step", measured)
    options = {
        **SMALL_RUN,
        "data": images,
        "dns": "c8-d1111,c16-d1111",
        "epochs": 1,
        "batch_size": 40,
        "subnets_per_step": 4,
        "warmup_epochs": 0,
        "probe_epochs": 0,
        "k": 5,
        "out": tmp_path / "out",
        "teacher": f"timm:test_efficientnet={weights}",
    }
    assert run(compare, *as_arguments(options)) == 0
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(report["runs"]) == ["c8-d1111", "c16-d1111", "family-n4-itself", "family-n4"]
    assert list(report["accuracy"]["kNN"]) == ["alone", "family-n4-itself", "family-n4"]
    itself, taught = report["runs"]["family-n4-itself"], report["runs"]["family-n4"]
    assert "teacher" not in itself["counted"] and taught["counted"]["teacher"] > 0
    assert taught["measured"]["parts"]["teacher"] > 0
    alone, together = report["ratios"]["separate runs"]["separate runs"], report["ratios"]["separate runs"]["family-n4"]
    assert together["counted"]["teacher"] == pytest.approx(alone["counted"]["teacher"] / 2), "one forward for both"
    for kind in ("counted", "measured"):
        parts = {name: value for name, value in together[kind].items() if name not in ("total", "seeds")}
        assert sum(parts.values()) == pytest.approx(together[kind]["total"])
    assert "teacher forward" in (tmp_path / "out" / "compare.md").read_text()
    facts = [json.loads((tmp_path / f"out/runs/{run}-seed0" / FACTS).read_text()) for run in ("c8-d1111", "family-n4")]
    assert facts[0] == facts[1] and not (tmp_path / "out/runs/family-n4-itself-seed0" / FACTS).exists()


def test_timed_step_has_the_time_of_the_teacher(taught):
    config = with_teacher(taught(batch_size=4), expected_facts(taught()))
    assert measure_in_this_process(config, 1).teacher > 0
    assert measure_in_this_process(without_teacher(config), 1).teacher == 0
