"""The loss between feature maps of subnets and teacher: formula in float64, targets, runs, costs and errors."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.nn import activate
from tests.interruption import check_resume
from train.config import PretrainConfig
from train.costs.communication import traffic
from train.costs.flops import map_shape, network_costs, run_cost
from train.pretraining import cuda_graphs
from train.pretraining.cuda_graphs import CapturedFunction
from train.pretraining.dspnet import DSPNet, Taught
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer
from train.selection.recording import calls_of, shape_of
from train.teachers.live import LiveFeatures
from train.teachers.targets import TeacherTargets
from train.teachers.teacher import FACTS, expected_facts, open_teacher, with_teacher

CPU = torch.device("cpu")
FEATURES, CHANNELS, WEIGHT = 7, 5, 0.7
FAMILY = {"network": "resnet", "dns": "c8-d1111,c16-d2111", "stem": "small"}


class Small(nn.Module):
    """An encoder in timm's form, whose features are not those of the map."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 4, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 16)

    def forward_features(self, x):
        return self.norm(self.conv(x)).relu()

    def forward_head(self, x):
        return self.last(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def encoder():
    return Small()


def map_teacher():
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2), nn.ReLU())


NETWORKS = {
    "resnet": ["c8-d1111", "c16-d2111"],
    "mobilenet_v3_large": ["w0.25", "w0.50"],
    f"{__name__}:encoder": ["w0.50", "w1.00"],
}


def make(network, size=32, **options):
    """A model in float64, images, targets, and the maps that they are made of."""
    torch.manual_seed(0)
    model = DSPNet(
        network,
        family(network, NETWORKS[network]),
        "standard",
        16,
        8,
        teacher_features=FEATURES,
        teacher_map_channels=CHANNELS,
        local_weight=WEIGHT,
        **{"self_weight": 0.0, **options},
    ).double()
    images = torch.randn(8, 3, size, size).double()
    with torch.no_grad():
        positions = model.online.encoder.forward_dense(images)[1].shape[2:].numel()
    given = Taught(torch.randn(8, FEATURES).double(), torch.randn(8, positions, CHANNELS).double() + 3)
    return model, images, TeacherTargets(lambda step, batch: given)(0, images), given


def gradients(model):
    return {name: p.grad for name, p in model.online.named_parameters() if p.grad is not None}


def local_formula(online, views, positions):
    """The sum over the views of the mean of 2 - 2 cos at every position."""
    head, centre = online.local_head, positions.mean((0, 1))
    total = torch.zeros((), dtype=torch.float64)
    for view, wanted in zip(views, positions.chunk(2)):
        y = online.encoder.forward_dense(view)[1]
        predicted = F.conv2d(y, head.fc.weight[:, : y.shape[1], None, None])
        mean, variance = predicted.mean((0, 2, 3), keepdim=True), predicted.var((0, 2, 3), correction=0, keepdim=True)
        predicted = (predicted - mean) / (variance + head.bn.eps).sqrt()
        predicted = predicted * head.bn.weight[:, None, None] + head.bn.bias[:, None, None]
        wanted = (wanted - centre).transpose(1, 2).unflatten(2, y.shape[2:])
        total = total + (2 - 2 * F.cosine_similarity(predicted, wanted, dim=1)).mean()
    return total


@pytest.mark.parametrize("network", NETWORKS, ids=["resnet", "mobilenet", "traced"])
@pytest.mark.parametrize("formulation", ["eager", "native"])
def test_loss_and_gradients_equal_the_written_out_formula(network, formulation, policy):
    model, images, taught, given = make(network, momentum_bn="off")
    twin, dn = copy.deepcopy(model), model.family.smallest
    policy(formulation)
    loss = model.loss(images, model.targets(images), dn, taught)
    loss.backward()
    policy("eager")
    views = images.chunk(2)
    with activate(twin.online, dn):
        expected = WEIGHT * local_formula(twin.online, views, given.positions)
        for view, feature in zip(views, given.features.chunk(2)):
            prediction = twin.online.teacher_head(twin.online.encoder(view))
            expected = expected + (2 - 2 * F.cosine_similarity(prediction, feature - given.features.mean(0))).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert gradients(model).keys() == gradients(twin).keys()
    torch.testing.assert_close(gradients(model), gradients(twin))


@pytest.mark.parametrize("self_weight", [0.0, 0.5])
def test_accumulated_gradients_equal_those_of_the_summed_loss(self_weight):
    model, images, taught, _ = make("mobilenet_v3_large", self_weight=self_weight, bn_groups=2)
    twin = copy.deepcopy(model)
    losses = model.accumulate(images, list(model.family), alpha=0.6, taught=taught)
    targets = twin.targets(images, alpha=0.6)
    total = sum(twin.loss(images, targets, dn, taught) for dn in twin.family)
    total.backward()
    torch.testing.assert_close(sum(losses.values()), total.detach())
    torch.testing.assert_close(gradients(model), gradients(twin))


@pytest.fixture
def taught(small):
    """taught(**options): the configuration of a small run whose subnets have maps of 2 x 2 positions."""
    source = {"teacher": f"{__name__}:map_teacher", "teacher_size": 24, "probe_epochs": 0, "local_weight": WEIGHT}
    return lambda **options: small(**{**source, **options})


def trainer_of(config, teacher):
    trainer = Trainer(with_teacher(config, teacher.facts), 10, CPU)
    trainer.teacher = TeacherTargets(LiveFeatures(teacher, CPU, config.grad_accum_steps))
    return trainer


def views(config):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2 * config.batch_size, 3, 12, 12), dtype=torch.uint8, generator=generator)


def test_targets_are_the_teachers_map_at_the_size_of_the_subnets_map(taught):
    teacher, images = open_teacher(taught(), CPU), torch.randn(4, 3, 12, 12)
    outputs = teacher.outputs(images)
    y = teacher.network(teacher.prepare(images))
    resampled = F.interpolate(y, (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(outputs.features, y.mean((2, 3)))
    torch.testing.assert_close(outputs.positions.transpose(1, 2).unflatten(2, (2, 2)), resampled)
    targets = TeacherTargets(lambda step, batch: outputs)(0, images)
    torch.testing.assert_close(targets.positions, outputs.positions - outputs.positions.mean((0, 1)))


def test_maps_of_timm_are_those_that_its_features_are_computed_from():
    config = PretrainConfig(teacher="timm:test_resnet", teacher_size=64, image_size=32, local_weight=1.0, **FAMILY)
    facts = expected_facts(config)
    plain = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    assert facts.map_channels == plain.num_features and facts.features == plain.num_features


def test_centre_is_that_of_the_whole_batch_with_micro_batches(taught):
    teacher = open_teacher(taught(), CPU)
    whole, parts = (trainer_of(taught(bn_groups=2, grad_accum_steps=steps), teacher) for steps in (1, 2))
    batch = views(whole.config)
    torch.testing.assert_close(parts.train_step(batch), whole.train_step(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.flat_buffers.params, whole.flat_buffers.params, rtol=1e-4, atol=1e-4)


def run_and_return(functions):
    for function in functions:
        function()
    return list(functions)


def test_captured_steps_equal_launched_steps(taught):
    teacher = open_teacher(taught(), CPU)
    plain, captured = trainer_of(taught(), teacher), trainer_of(taught(), teacher)
    flat = captured.flat_buffers
    captured.accumulate = cuda_graphs.captured(captured.model, flat, captured._alpha, run_and_return)
    captured.teacher._source._outputs = CapturedFunction(teacher.outputs, run_and_return)
    for index in range(2):
        batch = views(plain.config) + index
        torch.testing.assert_close(captured.train_step(batch), plain.train_step(batch), rtol=0, atol=0)
    torch.testing.assert_close(flat.params, plain.flat_buffers.params, rtol=0, atol=0)


def test_nonfinite_map_is_found(taught):
    trainer = trainer_of(taught(), open_teacher(taught(), CPU))
    outputs = trainer.teacher(0, views(trainer.config))
    trainer.teacher = lambda step, batch: outputs._replace(positions=outputs.positions.log())
    trainer.train_step(views(trainer.config))
    assert trainer.guard.skipped().total == 1
    assert trainer.diagnose(views(trainer.config)).subnet == "teacher"


def test_resume_is_exact_and_networks_can_be_evaluated(taught, tmp_path):
    torch.manual_seed(0)
    teacher = map_teacher()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    options = {"teacher_target": "whitened", "self_weight": 0.5, "optimizer": "adamw"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "map_teacher", lambda: teacher)
        assert "variance" in check_resume(taught, tmp_path, **options)
    assert json.loads((tmp_path / "run" / FACTS).read_text())["map_channels"] == CHANNELS
    own = PretrainConfig(teacher=str(tmp_path / "run"), image_size=12, local_weight=1.0, **FAMILY)
    assert open_teacher(own, CPU).facts.map_channels == 128  # 8 x 16 channels of the largest network


def test_costs_and_recorded_operators_include_the_head_of_maps(taught):
    config = with_teacher(taught(), expected_facts(taught()))
    costs, teacher = network_costs(config), expected_facts(config).cost(config, 80)
    local, pooled = (
        run_cost(config, 10, costs, t) for t in (teacher, expected_facts(taught(local_weight=0.0)).cost(config, 80))
    )
    positions = 2 * 2
    for dn, steps in (("c8-d1111", 15), ("c16-d2121", 20)):
        channels = costs[dn].features
        assert local.online[dn] - pooled.online[dn] == steps * 2 * 8 * 3 * channels * positions * CHANNELS
    assert map_shape(config) == (128, 2, 2)
    shapes = [call.arguments[0].shape for call in calls_of(config) if call.operator == "normalized_mse"]
    assert set(shapes) == {(16, CHANNELS), (16 * positions, CHANNELS)}
    assert shape_of(config, 1)["local_weight"] == WEIGHT
    config.bn_groups = 1
    assert traffic(config, 2).normalisation > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_weight": 0.5}, "--local-weight needs --teacher"),
        ({"teacher": "x", "local_weight": -1.0}, "--local-weight must"),
        ({"teacher": "x", "local_weight": 1.0, "teacher_cache": "c"}, "leave out one of them"),
    ],
)
def test_invalid_options_are_refused(small, options, message):
    with pytest.raises(InputError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": f"{__name__}:vit_teacher"}, r"has \[2, 17, 64\] before its pooling.* no CNN"),
        ({"teacher": f"{__name__}:pooled_teacher"}, "returns pooled features; use a CNN of timm"),
        ({"teacher_map_channels": 6}, f"--teacher-map-channels 6, but the map of .* has {CHANNELS}"),
        ({"network": f"{__name__}:pooled_teacher", "dns": "w1.00", "stem": "standard"}, "has no feature map before"),
    ],
)
def test_networks_without_a_map_are_refused_before_anything_is_written(taught, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        PretrainRun(taught(**options), resume=False)
    assert not (tmp_path / "run").exists()


def vit_teacher():
    return timm.create_model("test_vit", num_classes=0, img_size=24, patch_size=6)


def pooled_teacher():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
