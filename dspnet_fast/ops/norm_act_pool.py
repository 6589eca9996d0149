"""norm_act_pool: global average pooling of an activation with deferred normalisation, for squeeze-and-excite and the
last layer.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpp, triton
from .conv_moments import PooledGradient
from .deferred import activation_gradient, apply_activation, check_deferred, normalized, per_image
from .registry import operator


def _check_positions(x: Tensor) -> None:
    torch._check(x.shape[2] * x.shape[3] > 0, lambda: f"norm_act_pool: no positions in {list(x.shape)}")


@operator(checks=(functools.partial(check_deferred, "norm_act_pool"), _check_positions))
def norm_act_pool(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, gradient_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean over H and W of act(z), z = scale * x + shift.

    Args:
        x: raw output of a convolution, [N, C, H, W].
        scale: [V, C], a row per view or a single one, or None for no normalisation; fp32, or fp64 if x is.
        shift: like scale; None if scale is.
        act: activation function, one of `deferred.ACTS`.
        gradient_means: whether to compute the last two results. With them, the backward computes the gradients of scale
            and shift without reading x. Without them, it computes them first.

    Returns:
        The means over H and W of act(z), act'(z) and act'(z) x, [N, C] each in fp32, or fp64 if x is. The last two have
        no gradients, and are empty without gradient_means.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or x has no positions.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> y, _, _ = norm_act_pool(x, None, None, "relu", False)
        >>> torch.allclose(y, x.relu().mean((2, 3)))
        True
    """
    z = normalized(x, scale, shift)
    mean = apply_activation(z, act).mean((2, 3))
    if not gradient_means:
        return mean, mean.new_empty(0), mean.new_empty(0)
    gradient = activation_gradient(z, act)
    return mean, gradient.mean((2, 3)), (gradient * x).mean((2, 3))


@operator()
def norm_act_pool_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    gradient_mean: Tensor,
    gradient_x_mean: Tensor,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of norm_act_pool's first result, of which gradient_mean and gradient_x_mean are the other two:

        dx = d scale act'(z) / (H W)
        dscale = sum(d gradient_x_mean), dshift = sum(d gradient_mean), over the images of each view

    Returns:
        dx (channels-last), dscale and dshift. dx is empty without input_gradient, dscale and dshift without scale.
    """
    grad_x = x.new_empty(0)
    if input_gradient:
        part = grad[:, :, None, None] / (x.shape[2] * x.shape[3])
        part = part if scale is None else part * per_image(scale, len(x))
        grad_x = torch.empty_like(x, memory_format=torch.channels_last)
        grad_x.copy_(part * activation_gradient(normalized(x, scale, shift), act))
    if scale is None:
        return grad_x, grad.new_empty(0), grad.new_empty(0)
    grad_scale, grad_shift = (
        (grad * mean).unflatten(0, (len(scale), -1)).sum(1) for mean in (gradient_x_mean, gradient_mean)
    )
    return grad_x, grad_scale, grad_shift


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, ctx.act, _ = inputs
    ctx.save_for_backward(x, scale, shift, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Any, ...]:
    x, scale, shift, means, x_means = ctx.saved_tensors
    if scale is not None and not means.numel():
        _, means, x_means = norm_act_pool(x, scale, shift, ctx.act, True)
    return norm_act_pool_backward(grad, x, scale, shift, ctx.act, means, x_means, ctx.needs_input_grad[0])


norm_act_pool.register_autograd(_backward, _setup_context)


def pool_deferred(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """The first result of norm_act_pool. The gradient of x is not necessarily complete: see `_PoolOfConvolution`.

    Use it where no other code reads the gradient of x, in a network.
    """
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, shift))
    if wanted and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        recorded = norm_act_pool.recorded(x, scale, shift, act, True)
        if recorded is not None:
            return recorded(x, scale, shift, act, True, True)[0]
        link = getattr(x.grad_fn, "pooled_gradient", None)
        if isinstance(link, PooledGradient) and not link.claimed:
            link.claimed = True
            return _PoolOfConvolution.apply(x, scale, shift, act, link)
    return norm_act_pool(x, scale, shift, act, wanted)[0]


class _PoolOfConvolution(torch.autograd.Function):
    """norm_act_pool of a depthwise convolution's output x. Its backward leaves the gradient of x to the backward of the
    convolution, which reads x anyway, instead of reading x and writing a tensor of its size that autograd would add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, link: PooledGradient) -> Any:
        mean, *gradient_means = norm_act_pool(x, scale, shift, act, True)
        ctx.save_for_backward(x, scale, shift, *gradient_means)
        ctx.act, ctx.link = act, link
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, shift, mean, x_mean = ctx.saved_tensors
        _, dscale, dshift = norm_act_pool_backward(grad, x, scale, shift, ctx.act, mean, x_mean, False)
        ctx.link.put(grad, scale, shift, ctx.act)
        return None, *((None, None) if scale is None else (dscale, dshift)), None, None


cpp.serve(norm_act_pool, cpp.stores, autograd=True)
cpp.serve(norm_act_pool_backward, cpp.stores)
triton.serve(norm_act_pool, accepts=("x",))
triton.serve(norm_act_pool_backward, accepts=("x",))
