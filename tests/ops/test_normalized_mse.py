"""normalized_mse: value, gradients, precision, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from dspnet_fast.ops import normalized_mse

SHAPES = [(1, 1), (7, 7), (5, 769), (3, 5125), (130, 256)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def inputs(shape, dtype, requires_grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(2)]


def eager(p, z):
    """Written another way than the operator's body."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return (2 - 2 * F.cosine_similarity(p.to(wide), z.to(wide), dim=1, eps=1e-12)).mean()


def test_values_known_by_hand():
    p = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    z = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 9.0]])  # cosines 1, -1, 0
    torch.testing.assert_close(normalized_mse(p, z), torch.tensor((0.0 + 4.0 + 2.0) / 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_twice_eagers(shape, dtype, nan_filled):
    p, z = inputs(shape, dtype)
    p64, z64 = (v.detach().double().requires_grad_() for v in (p, z))
    exact = eager(p64, z64)
    loss, same_dtype = normalized_mse(p, z), eager(p, z)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
    unit = 4 * torch.finfo(loss.dtype).eps  # the loss lies in [0, 4]
    assert (loss.double() - exact).abs() <= 2 * (same_dtype.double() - exact).abs() + unit

    wanted = torch.autograd.grad(exact, (p64, z64))
    got, plain = torch.autograd.grad(loss, (p, z)), torch.autograd.grad(same_dtype, (p, z))
    for gradient, want, reference in zip(got, wanted, plain, strict=True):
        assert gradient.dtype == dtype
        # In one dimension the gradient is 0, and what remains is rounding of terms of the size of 2 / (N |p|).
        terms = 2 / (shape[0] * min(p64.norm(dim=1).min(), z64.norm(dim=1).min()))
        unit = torch.finfo(dtype).eps * want.abs().max() + torch.finfo(loss.dtype).eps * terms
        assert (gradient.double() - want).abs().max() <= 3 * (reference.double() - want).abs().max() + unit


def test_gradients_by_finite_differences():
    p, z = inputs((4, 5), torch.float64)
    assert torch.autograd.gradcheck(normalized_mse, (p, z))
    assert torch.autograd.gradgradcheck(normalized_mse, (p, z))


def test_gradient_only_where_wanted():
    p, z = inputs((4, 5), torch.float32)
    normalized_mse(p, z.detach()).backward()
    assert p.grad is not None and z.grad is None


def test_large_and_small_vectors_give_the_same_loss():
    p, z = inputs((6, 50), torch.float32, requires_grad=False)
    torch.testing.assert_close(normalized_mse(1e4 * p, 1e-3 * z), normalized_mse(p, z))


def test_zero_vectors_count_as_orthogonal():
    p, z = torch.zeros(2, 5, requires_grad=True), torch.randn(2, 5)
    loss = normalized_mse(p, z)
    assert loss == 2
    loss.backward()
    assert p.grad.isfinite().all()


def test_strided_inputs():
    p, z = torch.randn(10, 20)[:, :7], torch.randn(7, 10).t()
    torch.testing.assert_close(normalized_mse(p, z), normalized_mse(p.contiguous(), z.contiguous()))


def test_empty_inputs():
    assert normalized_mse(torch.empty(0, 5), torch.empty(0, 5)).isnan()
    assert normalized_mse(torch.empty(3, 0), torch.empty(3, 0)) == 2


@pytest.mark.parametrize(
    "p, z",
    [
        (torch.randn(4, 5), torch.randn(4, 6)),
        (torch.randn(4, 5), torch.randn(1, 5)),
        (torch.randn(5), torch.randn(5)),
        (torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64)),
    ],
    ids=["another width", "would broadcast", "one vector", "integers"],
)
def test_refused(p, z):
    with pytest.raises(RuntimeError, match="normalized_mse"):
        normalized_mse(p, z)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.dspnet.normalized_mse.default, tuple(inputs((7, 9), dtype)))


def test_compiles_without_a_graph_break():
    p, z = inputs((7, 9), torch.float32)
    compiled = torch.compile(lambda p, z: 3 * normalized_mse(p, z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p, z), 3 * normalized_mse(p, z))
    compiled(p, z).backward()
    gradient = p.grad.clone()
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * eager(p, z), p)[0])
