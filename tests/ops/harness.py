"""What the tests of all operators share: which providers to run, where, with which gradients, and the error rule.

A provider may be off from float64 by twice what the native body of the same dtype is off by, in gradients by three
times as much, and by a few units in the last place of the largest value. That value is the largest of the result
itself, in its own dtype, and of all results, in fp32. The latter because sums may cancel to almost nothing, and the
native body may then be right by luck: what fp32 loses is a share of the terms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import registry, triton
from dspnet_fast.ops.registry import Operator

# What a scalar loss weighs an operator's outputs with, or what makes it of the outputs.
Cotangents = tuple[Tensor, ...] | Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

OUTPUT, GRADIENT = 2, 3
# Units in the last place. Triton's interpreter adds up the rows of a tile one after another, a GPU in pairs.
UNITS = 16 if triton.INTERPRETED else 4
# Marks of what the interpreter takes long for, though it says little more: only make test-kernels waits for that.
SLOW_INTERPRETED = [pytest.mark.slow] if triton.INTERPRETED else []
# What activations are stored in: parameters of tests, without those that a provider does not serve (conftest.py).
NARROW = [  # nothing of ours trains in fp16
    pytest.param(torch.float16, id="fp16", marks=[pytest.mark.not_by("native", "cpp"), *SLOW_INTERPRETED]),
    pytest.param(torch.bfloat16, id="bf16"),
]
DTYPES = [pytest.param(torch.float32, id="fp32"), *NARROW]

torch.backends.cudnn.allow_tf32 = False  # the native body's convolutions, which the rule compares with
if triton.INTERPRETED:
    from tests.kernels import strict_interpreter

    strict_interpreter.install()


def providers(operator: Operator) -> list[Any]:
    """Parameters of a fixture: the native body, and every provider, skipped with its reason where it cannot run."""
    params: list[Any] = ["native"]
    for provider in operator.providers.values():
        supported, reason = provider.supported()
        params.append(pytest.param(provider.name, marks=pytest.mark.skipif(not supported, reason=reason)))
    return params


def device() -> str:
    """Where the provider in force runs: Triton's interpreter runs kernels for GPUs on the CPU."""
    return "cuda" if registry.get_policy() in ("triton", "cuda") and not triton.INTERPRETED else "cpu"


def to_device(arguments: dict) -> dict:
    """The arguments where the provider in force runs."""
    return {name: value.to(device()) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def double(arguments: dict) -> dict:
    """The arguments in float64."""
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def differentiable(arguments: dict) -> list[str]:
    """The names of the arguments that have gradients."""
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and not name.endswith("main_grad")]


def random_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random tensors like the outputs, on the CPU."""
    return tuple(torch.randn(output.shape).to(output.dtype) for output in outputs)


def run(
    op: Callable[..., Any], arguments: dict, cotangents: Cotangents = random_like
) -> tuple[tuple, tuple[Tensor, ...], tuple]:
    """Outputs, the cotangents that were used, and the gradients of all `differentiable` arguments, on the CPU."""
    wanted = differentiable(arguments)
    leaves = to_device(arguments)
    leaves |= {name: leaves[name].detach().requires_grad_() for name in wanted}
    outputs = op(*leaves.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if isinstance(op, Operator):
        assert not any(output._is_view() for output in outputs), "autograd does not let a caller write to a view"
    cotangents = cotangents if isinstance(cotangents, tuple) else cotangents(outputs)
    loss = sum((o * c.to(o.device, o.dtype)).sum() for o, c in zip(outputs, cotangents, strict=True))
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return tuple(o.detach().cpu() for o in outputs), cotangents, tuple(grad.cpu() for grad in grads)


def check(
    op: Callable[..., Any],
    outputs: Sequence[str],
    arguments: dict,
    cotangents: Cotangents = random_like,
) -> tuple[tuple, tuple]:
    """Judge the provider in force by the error rule; returns its outputs and gradients.

    outputs: names of the outputs to judge, the first ones.
    """
    in_force = registry.get_policy()
    got, cotangents, grads = run(op, arguments, cotangents)
    registry.set_policy("native")
    exact, _, exact_grads = run(op, double(arguments), cotangents)
    native, _, native_grads = run(op, arguments, cotangents)
    registry.set_policy(in_force)
    judged = len(outputs)
    check_errors(outputs, got[:judged], native[:judged], exact[:judged], OUTPUT)
    names = [f"gradient of {name}" for name in differentiable(arguments)]
    check_errors(names, grads, native_grads, exact_grads, GRADIENT)
    return got, grads


def check_errors(
    names: Sequence[str], got: Sequence[Tensor], native: Sequence[Tensor], exact: Sequence[Tensor], factor: int
) -> None:
    """Apply the rule to each result; all three sequences hold the same results, `exact` in float64."""
    largest = max((truth.abs().max().item() for truth in exact if truth.numel()), default=0.0)
    fp32_unit = torch.finfo(torch.float32).eps * largest
    for name, ours, eager, truth in zip(names, got, native, exact, strict=True):
        assert ours.shape == truth.shape and ours.dtype == eager.dtype, name
        if not truth.numel():
            continue
        assert ours.isfinite().all(), f"{name} is not finite"
        error, same_dtype = ((result.double() - truth).abs().max().item() for result in (ours, eager))
        unit = max(torch.finfo(ours.dtype).eps * truth.abs().max().item(), fp32_unit)
        assert error <= factor * same_dtype + UNITS * unit, f"{name}: off by {error:.3g}, native by {same_dtype:.3g}"


def check_every_build(run_python: Callable[..., str], module: str, calls: str) -> None:
    """Run a test module's function calls with the compiled library's builds for lesser processors.

    calls: statements in which the module is `t`; they run in a process of their own, with the seed of all tests.
    """
    for capability in ("avx2", "default"):
        program = (
            "import sys, torch; from dspnet_fast.ops import registry\n"
            f"sys.path.insert(0, 'tests/ops'); import {module} as t\n"
            "registry.set_policy('cpp')\n"
            "assert torch.backends.cpu.get_cpu_capability() != 'AVX512'\n"
            f"torch.manual_seed({torch.initial_seed()})\n"
        )
        run_python("-c", program + calls, ATEN_CPU_CAPABILITY=capability)
