"""Under autocast convolutions and matrix products of operators are computed in its dtype, as PyTorch's are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspnet_fast import ops
from dspnet_fast.nn import activate, fused, slimmable

HALF = [torch.bfloat16, torch.float16]


def conv(x: Tensor, weight: Tensor) -> Tensor:
    return ops.slim_conv2d(x, weight, torch.ones(4), None, 4, [1, 1], [1, 1], [1, 1], 1)


def moments(x: Tensor, weight: Tensor) -> Tensor:
    rows = torch.ones(1, x.shape[1])
    y, mean, variance = ops.conv_moments(x, rows, 0 * rows, "silu", None, weight, None, 4, 1, 1, 1, 2)
    assert mean.dtype == variance.dtype == torch.float32
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.slim_linear(x.mean((2, 3)), weight[:, :, :1, :1], torch.ones(4), None, 4)


def norm_act(x: Tensor, weight: Tensor) -> Tensor:
    return ops.norm_act(x, None, None, "relu", None, None, None, None)


CASTING = {
    conv: lambda x, weight: F.conv2d(x, weight[:4, :6], torch.ones(4), 1, 1),
    moments: lambda x, weight: F.conv2d(F.silu(x), weight[:4, :6], None, 1, 1),
    linear: lambda x, weight: F.linear(x.mean((2, 3)), weight[:4, :6, 0, 0], torch.ones(4)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("through_dispatcher", [False, True])
@pytest.mark.parametrize("function", CASTING, ids=lambda function: function.__name__)
def test_outputs_and_gradients_are_those_of_pytorch_under_autocast(function, through_dispatcher, dtype, monkeypatch):
    if through_dispatcher:
        monkeypatch.setattr(ops.registry, "is_plain_eager", lambda args: False)
    found = []
    for compute in (function, CASTING[function]):
        torch.manual_seed(0)
        x, weight = torch.randn(4, 6, 5, 5).requires_grad_(), torch.randn(8, 8, 3, 3).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = compute(x, weight)
        y.float().square().sum().backward()
        assert y.dtype == dtype and x.grad.dtype == weight.grad.dtype == torch.float32
        found.append((y.float(), x.grad, weight.grad))
    for got, want in zip(*found):
        assert (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("dtype", HALF)
def test_other_operators_compute_in_the_dtype_of_their_inputs(dtype):
    x = torch.randn(4, 6, 5, 5)
    with torch.autocast("cpu", dtype):
        assert norm_act(x, x).dtype == torch.float32 and norm_act(x.bfloat16(), x).dtype == torch.bfloat16
        y, *_ = ops.slim_batch_norm(x, None, None, 1e-5, 2)
        assert ops.normalized_mse(y[:, :, 0, 0].bfloat16(), x[:, :, 0, 0]).dtype == torch.float32
    torch.testing.assert_close(y, ops.slim_batch_norm(x, None, None, 1e-5, 2)[0])


def test_float64_is_not_cast():
    x, weight = torch.randn(4, 6, 5, 5).double(), torch.randn(8, 8, 3, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        y, *_ = ops.conv_moments(x, None, None, "relu", None, weight, None, 4, 1, 1, 1, 2)
    torch.testing.assert_close(y, F.conv2d(x.relu(), weight[:4, :6], None, 1, 1))


def test_compiled_operators_are_cast():
    x, weight = torch.randn(4, 6, 5, 5), torch.randn(8, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = moments(x, weight)
        got = torch.compile(moments, backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(got, expected)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.norm, self.head = nn.GroupNorm(2, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("policy_name", ["eager", "native"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_gradient_scaler_trains_subnets_as_without_it(policy_name, inside, dtype, policy):
    policy(policy_name)
    x, labels = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    torch.manual_seed(0)
    network = fused(slimmable(Model(), x))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loss_of(width: float) -> Tensor:
        with activate(network, width, views=2), torch.autocast("cpu", dtype):
            loss = F.cross_entropy(network(x).float(), labels)
            if inside:
                scaler.scale(loss).backward()
        if not inside:
            scaler.scale(loss).backward()
        return loss

    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append([loss_of(width).item() for width in (0.5, 1.0)])
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12 and losses[-1] < losses[0]
    with activate(network, 0.5), torch.autocast("cpu", dtype):
        (float("inf") * network(x).sum()).backward()
    before = network.head.weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.head.weight, before) and scaler.get_scale() == 2.0**11
