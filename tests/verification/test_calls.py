"""Recorded operator calls: deduplicated, reproduced by layout, with exact arguments of activation functions."""

import torch

from dspnet_fast.ops import conv_moments, conv_norm, norm_act
from dspnet_fast.verification.calls import GUARD, Call, Layout, odd_variants, record

WEIGHT = torch.empty(32, 16, 3, 3, device="meta")
X = torch.empty(4, 8, 6, 6, device="meta").contiguous(memory_format=torch.channels_last)


def convolve():
    return conv_moments(X, None, None, "relu", None, WEIGHT, None, 24, 1, 1, 1, 2)


def test_equal_calls_are_recorded_once():
    calls = record(lambda: (convolve(), convolve()))
    assert [call.operator for call in calls] == ["conv_moments"]
    assert calls[0].arguments[:2] == (Layout((4, 8, 6, 6), (288, 1, 48, 8), 0, torch.float32), None)
    assert calls[0].arguments[7:] == (24, 1, 1, 1, 2)
    assert calls[0].describe() == "x 4x8x6x6, weight 32x16x3x3"


def test_gradients_and_views_of_a_buffer_are_recorded():
    buffer = torch.empty(100, device="meta")

    def run():
        x = X.clone().requires_grad_()
        scale, shift = buffer[9:25].view(2, 8).requires_grad_(), torch.empty(2, 8, device="meta")
        norm_act(x, scale, shift, "relu", None, None, None, None).sum().backward()

    forward, backward = record(run)
    assert (forward.operator, backward.operator) == ("norm_act", "norm_act_backward")
    assert forward.arguments[1] == Layout((2, 8), (8, 1), 9, torch.float32)
    assert backward.arguments[0].stride == (0, 0, 0, 0), "the gradient of a sum is expanded"


def test_parts_of_an_operator_and_their_gradients_are_recorded():
    weight, gamma = WEIGHT.clone().requires_grad_(), torch.empty(32, device="meta")

    def run():
        y, scale, *_ = conv_norm(
            *(X, None, None, "relu", None, weight, None, 24, 1, 1, 1, 2), gamma, None, None, None, 1e-5
        )
        (y.sum() + scale.sum()).backward()

    calls = {call.operator: call for call in record(run)}
    gradients = ["scale_shift_backward", "conv_moments_backward"]
    assert list(calls) == ["conv_norm", "conv_moments", "scale_shift", *gradients]
    assert calls["conv_moments"].arguments == calls["conv_norm"].arguments[:12]
    assert calls["scale_shift"].arguments[2:] == calls["conv_norm"].arguments[12:]


def test_random_arguments_have_the_recorded_layout():
    (call,) = record(convolve)
    first, again = (call.random(torch.device("cpu"), seed=0) for _ in range(2))
    assert Layout.of(first[0]).stride == call.arguments[0].stride
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], call.random(torch.device("cpu"), 1)[0])
    assert len(first[5]._base) == WEIGHT.numel() + 2 * GUARD


def test_arguments_of_activation_functions_are_exact_and_no_kink():
    layouts = (
        Layout((4, 8, 6, 6), (288, 1, 48, 8), 0, torch.bfloat16),
        *2 * [Layout((1, 8), (8, 1), 0, torch.float32)],
    )
    call = Call("norm_act", (*layouts, "hardswish", None, None, None, None))
    x, scale, shift = call.random(torch.device("cpu"), 0)[:3]
    z = x.float() * scale.view(1, 8, 1, 1) + shift.view(1, 8, 1, 1)
    assert torch.equal(z.double(), x.double() * scale.view(1, 8, 1, 1).double() + shift.view(1, 8, 1, 1).double())
    assert not any((z == kink).any() for kink in (-3, 0, 3))


def test_odd_variants_have_odd_sizes_and_are_valid():
    variants = odd_variants(record(convolve))
    assert {variant.arguments[0].shape for variant in variants} >= {(4, 7, 6, 6), (4, 8, 5, 5)}
    assert all(variant.is_valid() for variant in variants)
