"""The algorithm of section 4 of the paper, in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from dspnet_fast.models import family
from dspnet_fast.nn import activate
from dspnet_fast.nn.batch_norm import MomentumBatchNorm
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers

RESNET = ("resnet", ["c8-d1111", "c8-d2111", "c16-d2111"])
MOBILENET = ("mobilenet_v3_large", ["w0.25", "w0.375", "w0.50"])


def make(network, names, **options):
    torch.manual_seed(0)
    model = DSPNet(network, family(network, names), "small", 32, 16, **options).double()
    for parameter in model.target.parameters():  # online and target differ, as after some steps
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(8, 3, 16, 16).double()


def gradients(model):
    return {name: p.grad for name, p in model.online.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("network", "names"), [RESNET, MOBILENET])
@pytest.mark.parametrize("momentum_bn", ["off", "on"])
def test_accumulated_gradients_equal_those_of_the_summed_loss(network, names, momentum_bn):
    model, images = make(network, names, momentum_bn=momentum_bn)
    twin = copy.deepcopy(model)
    losses = model.accumulate(images, list(model.family), alpha=0.6)
    targets = twin.targets(images, alpha=0.6)
    total = sum(twin.loss(images, targets, dn) for dn in twin.family)
    total.backward()
    torch.testing.assert_close(sum(losses.values()), total.detach())
    expected = gradients(twin)
    assert gradients(model).keys() == expected.keys() == dict(model.online.named_parameters()).keys()
    torch.testing.assert_close(gradients(model), expected)


def test_loss_equals_the_papers_formula():
    model, images = make(*RESNET, momentum_bn="off")
    dn = model.family[1]
    with activate(model.online, dn):
        p1, p2 = (model.online(view) for view in images.chunk(2))
    z1, z2 = (model.target(view).detach() for view in images.chunk(2))

    def regression(p, z):
        return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1)  # eq. 4: = 2 - 2 cos(p, z)

    expected = (regression(p1, z2) + regression(p2, z1)).mean()
    torch.testing.assert_close(model.loss(images, model.targets(images), dn), expected)


def test_batch_norm_separates_the_views():
    model, images = make(*RESNET, momentum_bn="off")
    dn = model.family[0]
    targets = model.targets(images)
    first_only = torch.cat([images[:4], 100 * torch.randn_like(images[4:])])
    model.targets(first_only)
    with activate(model.online, dn, views=2):
        torch.testing.assert_close(model.online(images)[:4], model.online(first_only)[:4])
    torch.testing.assert_close(
        targets[4:], model.targets(first_only)[4:]
    )  # targets are swapped: rows from 4 on belong to view 1


@pytest.mark.parametrize("momentum_bn", ["off", "on", "momentum2"])
def test_targets_have_no_gradient_and_use_the_full_network(momentum_bn):
    model, images = make(*RESNET, momentum_bn=momentum_bn)
    with activate(model.online, "c8-d1111"):  # the active online subnet has no effect
        targets = model.targets(images)
    assert not targets.requires_grad and not any(p.requires_grad for p in model.target.parameters())
    model.accumulate(images, list(model.family))
    assert all(p.grad is None for p in model.target.parameters())
    assert targets.shape == (8, 16)


def test_momentum_batch_norm_replaces_every_target_layer_and_sees_each_batch_once():
    model, images = make(*RESNET, momentum_bn="momentum2")
    layers = [m for m in model.target.modules() if isinstance(m, MomentumBatchNorm)]
    assert len(layers) == sum("running_mean" in name for name in model.target.state_dict())
    model.accumulate(images, list(model.family), alpha=0.3)
    assert all(m.double_correction and m.alpha == 0.3 and m.num_batches_tracked == 1 for m in layers)
    assert not any(isinstance(m, MomentumBatchNorm) for m in model.online.modules())


def test_target_averages_parameters_but_not_buffers():
    model, images = make(*RESNET)
    model.accumulate(images, [model.family.full])
    before = copy.deepcopy(model.target.state_dict())
    online = copy.deepcopy(model.online.state_dict())
    FlatBuffers(model.online, model.target).step(0.0, 0.9, weight_decay=0.0, momentum=0.0, eta=1.0)
    parameters = dict(model.target.named_parameters())
    assert {name.split(".")[0] for name in parameters} == {"encoder", "projector"}
    for name, value in model.target.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * online[name] if name in parameters else before[name]
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(model.online.state_dict(), online, rtol=0, atol=0)


def test_target_starts_equal_to_the_online_network():
    torch.manual_seed(0)
    model = DSPNet("resnet", family("resnet", ["c8-d1111"]), "small", 32, 16)
    online = model.online.state_dict()
    for name, value in model.target.state_dict().items():
        torch.testing.assert_close(value, online[name], rtol=0, atol=0)


def test_family_of_one_equals_byol():
    model, images = make("resnet", ["c8-d1111"], momentum_bn="off")
    twin = copy.deepcopy(model)
    losses = model.accumulate(images, [model.family.full])
    p1, p2 = (twin.online(view) for view in images.chunk(2))
    with torch.no_grad():
        z1, z2 = (twin.target(view) for view in images.chunk(2))
    pairs = ((p1, z2), (p2, z1))
    loss = sum((2 - 2 * F.cosine_similarity(p, z)).mean() for p, z in pairs)
    loss.backward()
    torch.testing.assert_close(losses["c8-d1111"], loss.detach())
    torch.testing.assert_close(gradients(model), gradients(twin))


def test_order_of_subnets_does_not_change_the_sum():
    model, images = make(*RESNET)
    results = []
    for order in itertools.permutations(model.family):
        twin = copy.deepcopy(model)
        twin.accumulate(images, order)
        results.append(gradients(twin))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_bf16_losses_are_close_to_float64():
    model, images = make(*RESNET)
    low = copy.deepcopy(model).float()
    low.precision = "bf16"
    exact = model.accumulate(images, list(model.family))
    rough = low.accumulate(images.float(), list(low.family))
    for name, loss in exact.items():
        assert rough[name].dtype == torch.float32
        assert abs(rough[name] - loss) < 0.05
