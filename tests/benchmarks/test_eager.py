"""The eager baseline of the step benchmark computes the same step as the trainer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.eager import EagerStep, ema, lars
from dspnet_fast.models import family
from train.config import PretrainConfig
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.trainer import Trainer

MOBILENET = ("mobilenet_v3_large", ["w0.25", "w0.375", "w0.50"])
RESNET = ("resnet", ["c8-d1111", "c8-d2121", "c16-d2121"])
LARS = {"weight_decay": 0.1, "momentum": 0.9, "eta": 0.01}


def make(network, names, stem):
    torch.manual_seed(0)
    model = DSPNet(network, family(network, names), stem, 32, 16, momentum_bn="off").double()
    for parameter in model.parameters():  # as after some steps: nonzero biases, different online and target weights
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def named(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize(("network", "names"), [MOBILENET, RESNET])
@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("small", {}),
        ("standard", {}),
        ("small", {"channels_last": False}),
        ("small", {"views": "stacked"}),
        ("small", {"views": "sequential"}),
    ],
    ids=["small stem", "standard stem", "default layout", "views stacked", "view by view"],
)
def test_losses_gradients_and_updates_equal_ours(network, names, stem, options, policy):
    policy("native")
    model = make(network, names, stem)
    eager = EagerStep(model, **options, **LARS)
    flat = FlatBuffers(model.online, model.target)
    for _ in range(2):  # the second step has momentum
        images = torch.randn(8, 3, *2 * [64 if stem == "standard" else 32]).double()
        losses = model.accumulate(images, list(model.family))
        torch.testing.assert_close(eager.accumulate(images, list(model.family)), losses)
        torch.testing.assert_close(eager.gradients, {name: p.grad for name, p in model.online.named_parameters()})

        flat.step(0.3, 0.9, **LARS)
        eager.update(0.3, 0.9)
        torch.testing.assert_close(eager.parameters, named(model.online.named_parameters()))
        torch.testing.assert_close(eager.targets, named(model.target.named_parameters()))
        assert not any(gradient.any() for gradient in eager.gradients.values())


def make_trainer():
    config = PretrainConfig(
        recipe="paper",
        network="resnet",
        dns="c8-d1111,c16-d1111",
        stem="small",
        hidden_features=32,
        out_features=16,
        batch_size=16,
        momentum_bn="off",
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
    )
    return Trainer(config, 10, torch.device("cpu"))


BATCH = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("views", ["separate", "stacked", "sequential"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_on_uint8_images_equals_the_trainers(precision, views, policy):
    policy("native")
    trainer = make_trainer()
    eager = EagerStep(trainer.model, precision=precision, views=views)
    lr, tau = trainer.learning_rate(trainer.step), trainer.tau(trainer.step)
    expected = trainer.train_step(BATCH)
    losses = eager.step(BATCH, list(trainer.model.family), lr, tau)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5 if precision == "fp32" else 0.05)


def test_bf16_step_multiplies_in_bf16_except_depthwise_convolutions():
    model = DSPNet("mobilenet_v3_large", family("mobilenet_v3_large", ["w0.25"]), "small", 32, 16, momentum_bn="off")
    dtypes = {True: set(), False: set()}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
                dtypes[args[-2 if func is torch.ops.aten.convolution_backward.default else -1] > 1].add(args[0].dtype)
            elif func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                dtypes[False].add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    eager = EagerStep(model, precision="bf16")
    with Recorder():
        eager.step(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), list(model.family), 0.1, 0.9)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    "scalars", [float, lambda value: torch.tensor(value, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_multi_tensor_lars_and_ema_equal_lars_ema_step(scalars):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (5,), (6, 4), (3, 3)]
    online, target = (
        torch.nn.ParameterList(torch.randn(s, generator=generator).double() for s in shapes) for _ in "12"
    )
    with torch.no_grad():
        online[3].zero_()  # a norm of zero: no adaptation
    target.requires_grad_(False)
    parameters, targets = ([p.detach().clone() for p in network] for network in (online, target))
    momenta = [torch.zeros_like(p) for p in parameters]
    flat = FlatBuffers(online, target)
    for _ in range(3):
        gradients = [torch.randn(s, generator=generator).double() for s in shapes]
        for parameter, gradient in zip(online, gradients, strict=True):
            parameter.grad.copy_(gradient)
        flat.step(0.3, 0.9, **LARS)
        lars(parameters, gradients, momenta, scalars(0.3), **LARS)
        ema(targets, parameters, scalars(0.9))
    torch.testing.assert_close(parameters, [p.detach() for p in online])
    torch.testing.assert_close(targets, list(target))
    torch.testing.assert_close(momenta, list(flat.momentum().values()))


def test_captured_step_equals_steps_and_capturing_keeps_the_state():
    def run_and_return(functions):
        for function in functions:
            function()
        return functions

    model = make_trainer().model
    plain, captured = EagerStep(model), EagerStep(model)
    batch, subnets = BATCH.clone(), list(model.family)
    replay = captured.graphed(batch, subnets, run_and_return)
    torch.testing.assert_close(captured.parameters, plain.parameters, rtol=0, atol=0)
    for lr in (0.1, 0.2):
        batch.copy_(BATCH.flip(0))
        torch.testing.assert_close(replay(lr, 0.9), plain.step(batch, subnets, lr, 0.9))
    torch.testing.assert_close(captured.parameters, plain.parameters)
    torch.testing.assert_close(captured.targets, plain.targets)
