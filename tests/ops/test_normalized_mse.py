"""normalized_mse: value, gradients and precision of every provider, and rejected arguments."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dspnet_fast.ops import cpp, normalized_mse
from dspnet_fast.ops.normalized_mse import EPS, normalized_mse_backward

SHAPES = [(1, 1), (7, 7), (5, 769), (3, 5125), (130, 256), (8200, 3)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

needs_cpp = pytest.mark.skipif(not cpp.has("normalized_mse")[0], reason=cpp.has("normalized_mse")[1])


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


def inputs(shape, dtype, requires_grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(2)]


def eager(p, z):
    """The loss by F.cosine_similarity, which the operator's body does not use."""
    dtype = torch.promote_types(torch.promote_types(p.dtype, z.dtype), torch.float32)
    return (2 - 2 * F.cosine_similarity(p.to(dtype), z.to(dtype), dim=1, eps=1e-12)).mean()


def check(p: Tensor, z: Tensor, forward=normalized_mse, backward=normalized_mse_backward) -> None:
    """The error rule, for the loss and both gradients.

    In float64 the reference is no more precise than the provider: there both may differ by rounding.
    """
    p, z = (v.detach().requires_grad_() for v in (p, z))
    p64, z64 = (v.detach().double().requires_grad_() for v in (p, z))
    exact, same_dtype, loss = eager(p64, z64), eager(p, z), forward(p.detach(), z.detach())
    assert loss.dtype == same_dtype.dtype and loss.shape == ()
    rounding = 10 if loss.dtype == torch.float64 else 1
    unit = rounding * 4 * torch.finfo(loss.dtype).eps  # the loss lies in [0, 4]
    assert (loss.double() - exact).abs() <= 2 * (same_dtype.double() - exact).abs() + unit

    d = torch.full_like(loss, -1.75)
    wanted = torch.autograd.grad(exact, (p64, z64), d.double())
    plain = torch.autograd.grad(same_dtype, (p, z), d)
    for gradient, want, reference in zip(backward(d, p.detach(), z.detach(), True, True), wanted, plain, strict=True):
        assert gradient.dtype == reference.dtype
        # In one dimension the gradient is 0 and only the rounding errors of its terms, about 2 d / (N |p|), remain.
        terms = 4 / (len(p) * min(p64.norm(dim=1).min(), z64.norm(dim=1).min()))
        unit = torch.finfo(gradient.dtype).eps * want.abs().max() + rounding * torch.finfo(loss.dtype).eps * terms
        assert (gradient.double() - want).abs().max() <= 3 * (reference.double() - want).abs().max() + unit


def test_loss_equals_values_computed_by_hand(provider):
    p = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    z = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 9.0]])  # cosines 1, -1, 0
    torch.testing.assert_close(normalized_mse(p, z), torch.tensor((0.0 + 4.0 + 2.0) / 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_provider_satisfies_the_error_rule(provider, shape, dtype, nan_filled):
    check(*inputs(shape, dtype))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)], ids=str)
def test_error_rule_for_inputs_of_two_dtypes(provider, dtypes):
    check(*(torch.randn(9, 77).to(dtype) for dtype in dtypes))


def test_autograd_uses_the_backward_operator(provider):
    p, z = inputs((130, 77), torch.float32)
    got = torch.autograd.grad(3 * normalized_mse(p, z), (p, z))
    want = normalized_mse_backward(torch.tensor(3.0), p.detach(), z.detach(), True, True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradients_equal_finite_differences(provider):
    p, z = inputs((4, 5), torch.float64)
    assert torch.autograd.gradcheck(normalized_mse, (p, z))
    assert torch.autograd.gradgradcheck(normalized_mse, (p, z))


def test_gradient_is_computed_only_if_requested(provider):
    p, z = inputs((4, 5), torch.float32)
    normalized_mse(p, z.detach()).backward()
    assert p.grad is not None and z.grad is None
    dp, dz = normalized_mse_backward(torch.tensor(1.0), p.detach(), z.detach(), False, True)
    assert dp.shape == (0,) and dz.shape == (4, 5)


def test_loss_does_not_depend_on_vector_lengths(provider):
    p, z = inputs((6, 50), torch.float32, requires_grad=False)
    torch.testing.assert_close(normalized_mse(1e4 * p, 1e-3 * z), normalized_mse(p, z))


def test_zero_vectors_count_as_orthogonal(provider):
    p, z = torch.zeros(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = normalized_mse(p, z)
    assert loss == 2
    loss.backward()
    assert p.grad.isfinite().all()


def test_lengths_below_eps_are_replaced_by_eps(provider):
    p, z = (EPS / 10 * F.normalize(torch.randn(4, 50))).requires_grad_(), torch.randn(4, 50)
    loss = normalized_mse(p, z)
    torch.testing.assert_close(loss, (2 - 2 * (p / EPS * F.normalize(z)).sum(1)).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], -2 / 4 / EPS * F.normalize(z))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_input_spreads_to_the_loss_and_the_gradient_of_its_row_only(provider, poison):
    p, z = inputs((6, 50), torch.float32)
    with torch.no_grad():
        p[2, 7] = poison
    loss = normalized_mse(p, z)
    assert loss.isnan()
    dp, dz = torch.autograd.grad(loss, (p, z))
    for gradient in (dp, dz):
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4, 5]].isfinite().all()


def test_error_rule_for_strided_inputs(provider):
    p, z = torch.randn(10, 20)[:, :7], torch.randn(7, 10).t()
    torch.testing.assert_close(normalized_mse(p, z), normalized_mse(p.contiguous(), z.contiguous()))
    check(p, z)


def test_empty_inputs(provider):
    assert normalized_mse(torch.empty(0, 5), torch.empty(0, 5)).isnan()
    assert normalized_mse(torch.empty(3, 0), torch.empty(3, 0)) == 2
    for shape in ((0, 5), (3, 0)):
        p, z = torch.empty(shape, requires_grad=True), torch.empty(shape)
        normalized_mse(p, z).backward()
        assert p.grad.shape == shape


REFUSED = {
    "another width": (torch.randn(4, 5), torch.randn(4, 6)),
    "would broadcast": (torch.randn(4, 5), torch.randn(1, 5)),
    "one vector": (torch.randn(5), torch.randn(5)),
    "integers": (torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_rejected(provider, case):
    with pytest.raises(RuntimeError, match="normalized_mse"):
        normalized_mse(*REFUSED[case])


@needs_cpp
@pytest.mark.parametrize("case", [*REFUSED, "without storage", "another device"])
def test_library_rejects_invalid_arguments(case):
    if case == "without storage":
        p, z = torch.randn(4, 5), torch.randn(4, 5)
        z.untyped_storage().resize_(0)
    elif case == "another device":
        p, z = torch.randn(4, 5), torch.randn(4, 5, device="meta")
    else:
        p, z = REFUSED[case]
    for call in (
        lambda: torch.ops.dspnet_cpp.normalized_mse(p, z),
        lambda: torch.ops.dspnet_cpp.normalized_mse_backward(torch.tensor(1.0), p, z, True, True),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()


@needs_cpp
@pytest.mark.parametrize("grad", [torch.ones(1), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")])
def test_library_rejects_invalid_gradient_of_the_loss(grad):
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.dspnet_cpp.normalized_mse_backward(grad, torch.randn(4, 5), torch.randn(4, 5), True, True)


@needs_cpp
def test_results_are_bitwise_equal_for_any_number_of_threads(policy):
    policy("cpp")
    p, z = inputs((300, 769), torch.float32, requires_grad=False)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        loss = normalized_mse(p, z)
        results.append((loss, *normalized_mse_backward(torch.ones_like(loss), p, z, True, True)))
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


def test_opcheck(provider):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.dspnet.normalized_mse.default, tuple(inputs((7, 9), dtype)))
        p, z = inputs((7, 9), dtype, requires_grad=False)
        for wanted in ((True, True), (True, False), (False, False)):
            torch.library.opcheck(torch.ops.dspnet.normalized_mse_backward.default, (torch.tensor(1.0), p, z, *wanted))


def test_compiles_without_a_graph_break(provider):
    p, z = inputs((7, 9), torch.float32)
    compiled = torch.compile(lambda p, z: 3 * normalized_mse(p, z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p, z), 3 * normalized_mse(p, z))
    compiled(p, z).backward()
    gradient = p.grad.clone()
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * eager(p, z), p)[0])


EVERY_CASE = """
import torch
from dspnet_fast.ops import registry
from tests.ops.test_normalized_mse import DTYPES, SHAPES, check, inputs
registry.set_policy("cpp")
torch.set_num_threads(3)
torch.manual_seed(0)
for shape in SHAPES:
    for dtype in DTYPES:
        check(*inputs(shape, dtype))
        check(inputs(shape, dtype)[0], inputs(shape, torch.float32)[0])
print(torch.ops.dspnet_cpp.cpu_capability())
"""


def test_every_cpu_capability(run_python, capability):
    assert run_python("-c", EVERY_CASE, ATEN_CPU_CAPABILITY=capability.lower()).strip() == capability
