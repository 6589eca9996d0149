"""Operators of the compiled library that record their gradients, compared with the autograd functions in Python."""

import pytest
import torch
from harness import run
from test_conv_moments import make, needs_cpp

from dspnet_fast.ops import conv_moments, conv_norm, norm_act_pool, registry, scale_shift
from dspnet_fast.ops.norm_act_pool import pool_deferred

pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def chosen(policy):
    policy("cpp")


def network(x, depthwise, squeeze, gamma, beta):
    """Depthwise convolution, batch norm of two views, squeeze-and-excite."""
    y, *moments = conv_moments(x, None, None, "identity", None, depthwise, None, 8, 1, 1, 8, 2)
    rows = scale_shift(*moments, gamma, None, beta, None, 1e-5)
    gate = torch.sigmoid(pool_deferred(y, *rows, "hardswish") @ squeeze)
    return conv_moments(y, *rows, "hardswish", gate, squeeze[:, :, None, None], None, 6, 1, 0, 1, 0)[0]


def gradients(leaves, output):
    torch.manual_seed(1)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), leaves)


def leaves():
    torch.manual_seed(0)
    shapes = ((4, 8, 6, 5), (8, 1, 3, 3), (8, 8), (8,), (8,))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def test_gradients_equal_those_of_the_functions_in_python(monkeypatch):
    given = leaves()
    output = network(*given)
    assert "ConvMoments" in output.grad_fn.name()
    got = gradients(given, output)
    monkeypatch.setattr(registry, "_recording", lambda name, device: None)
    again = network(*given)
    assert type(again.grad_fn).__name__ == "conv_momentsBackward"
    assert torch.equal(output, again) and all(map(torch.equal, got, gradients(given, again)))


def test_pooled_gradient_reaches_the_convolution_of_a_retained_graph_once_per_backward():
    given = leaves()
    output = network(*given)
    first = torch.autograd.grad(output.sum(), given, retain_graph=True)
    again = torch.autograd.grad(output.sum(), given)
    assert all(map(torch.equal, first, again))


def test_convolution_and_scale_shift_are_recorded_as_one_node(policy):
    x, depthwise, _, gamma, beta = leaves()
    arguments = x, None, None, "relu", None, depthwise, None, 8, 1, 1, 8, 2, gamma, None, beta, None, 1e-5
    y, scale, *_ = conv_norm(*arguments)
    assert y.grad_fn is scale.grad_fn and "ConvMoments" in y.grad_fn.name()
    assert "ScaleShift" not in str(y.grad_fn.next_functions)
    registry.set_policy("auto")
    for part in ("conv_moments", "conv_moments_backward", "scale_shift", "scale_shift_backward"):
        registry.use_findings({(part, "cpp"): "it was refused"})
        assert type(conv_norm(*arguments)[0].grad_fn).__name__ == "conv_normBackward"
    registry.use_findings({})


def test_main_grad_of_another_shape_is_rejected_in_one_call():
    x, depthwise, _, gamma, beta = leaves()
    with pytest.raises(RuntimeError, match="norm_weight_main_grad must have the shape"):
        conv_norm(
            *(x, None, None, "relu", None, depthwise, None, 8, 1, 1, 8, 2), gamma, torch.zeros(1), beta, None, 1e-5
        )


def test_two_poolings_of_one_output_have_complete_gradients():
    x, depthwise, *_ = leaves()
    y = conv_moments(x, None, None, "identity", None, depthwise, None, 8, 1, 1, 8, 0)[0]
    got = gradients([x, depthwise], sum(pool_deferred(y, None, None, "relu") for _ in range(2)))
    y = conv_moments(x, None, None, "identity", None, depthwise, None, 8, 1, 1, 8, 0)[0]
    want = gradients([x, depthwise], 2 * norm_act_pool(y, None, None, "relu", True)[0])
    torch.testing.assert_close(got, want)


def test_gradient_operator_of_another_provider_is_called_from_python(monkeypatch):
    registry.set_policy("auto")
    monkeypatch.setattr(registry, "_findings", {("conv_moments_backward", "cpp"): "it was refused"})
    registry._candidates.cache_clear()
    arguments = make("pointwise")
    y = conv_moments(*(v.requires_grad_() if n == "weight" else v for n, v in arguments.items()))[0]
    assert type(y.grad_fn).__name__ == "conv_momentsBackward"
    monkeypatch.undo()
    registry._candidates.cache_clear()


def test_second_derivative_is_rejected():
    x, depthwise, *_ = leaves()
    y = conv_moments(x, None, None, "identity", None, depthwise, None, 8, 1, 1, 8, 0)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_input_changed_in_place_before_the_backward_is_an_error():
    arguments = make("pointwise")
    arguments["weight"].requires_grad_()
    y = conv_moments(*arguments.values())[0]
    arguments["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_main_grad_of_a_frozen_weight_does_not_change():
    mean, variance = torch.randn(2, 8).requires_grad_(), torch.rand(2, 8)
    gamma, main_grad = torch.randn(8), torch.zeros(8)
    scale_shift(mean, variance, gamma, main_grad, None, None, 1e-5)[1].sum().backward()
    assert main_grad.count_nonzero() == 0 and mean.grad is not None


def test_main_grad_of_another_shape_is_rejected():
    arguments = make("pointwise")
    arguments |= {"weight": arguments["weight"].requires_grad_(), "main_grad": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="main_grad must have the shape"):
        conv_moments(*arguments.values())


def test_no_gradient_is_recorded_without_one_wanted():
    arguments = make("pointwise")
    (y, *_), _, _ = run(conv_moments, arguments)
    assert not conv_moments(*arguments.values())[0].requires_grad
    with torch.no_grad():
        assert torch.equal(conv_moments(*(arguments | {"weight": arguments["weight"].requires_grad_()}).values())[0], y)
