"""Shared parts of the operators' tests: providers, devices, gradients, and the check by the error rule."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import registry, triton
from dspnet_fast.ops.registry import Operator
from dspnet_fast.verification.error_rule import GRADIENT, OUTPUT, judge

# Weights of an operator's outputs in a scalar loss, or a function that makes them from the outputs.
Cotangents = tuple[Tensor, ...] | Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

# Marks of cases that are slow in the interpreter and add little: only make test-kernels runs them.
SLOW_INTERPRETED = [pytest.mark.slow] if triton.INTERPRETED else []
# Dtypes of activations, as test parameters; conftest.py skips those that a provider does not support.
NARROW = [  # training does not use fp16
    pytest.param(torch.float16, id="fp16", marks=[pytest.mark.not_by("native", "cpp"), *SLOW_INTERPRETED]),
    pytest.param(torch.bfloat16, id="bf16"),
]
DTYPES = [pytest.param(torch.float32, id="fp32"), *NARROW]

torch.backends.cudnn.allow_tf32 = False  # of the native body, the reference of the error rule
if triton.INTERPRETED:
    from tests.kernels import strict_interpreter

    strict_interpreter.install()


def providers(operator: Operator) -> list[Any]:
    """Fixture parameters: the native body and every provider, skipped with the reason if it cannot run."""
    params: list[Any] = ["native"]
    for provider in operator.providers.values():
        supported, reason = provider.supported()
        params.append(pytest.param(provider.name, marks=pytest.mark.skipif(not supported, reason=reason)))
    return params


def provider_of(operator: Operator) -> Any:
    """A fixture `provider`, which repeats a test for the native body and every provider, as the active one."""

    @pytest.fixture(params=providers(operator))
    def provider(request: pytest.FixtureRequest, policy: Callable[[str], None]) -> str:
        policy(request.param)
        return request.param

    return provider


def device() -> str:
    """Device of the active provider; Triton's interpreter runs GPU kernels on the CPU."""
    return "cuda" if registry.get_policy() in ("triton", "cuda") and not triton.INTERPRETED else "cpu"


def to_device(arguments: dict) -> dict:
    """The arguments on the device of the active provider."""
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
    """Outputs, cotangents used, and gradients of all `differentiable` arguments, on the CPU."""
    wanted = differentiable(arguments)
    leaves = to_device(arguments)
    leaves |= {name: leaves[name].detach().requires_grad_() for name in wanted}
    outputs = op(*leaves.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if isinstance(op, Operator):
        assert not any(output._is_view() for output in outputs), "autograd forbids in-place writes to a view"
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
    """Check the active provider by the error rule; returns its outputs and gradients.

    outputs: names of the first outputs, which are checked.
    """
    active = registry.get_policy()
    got, cotangents, grads = run(op, arguments, cotangents)
    registry.set_policy("native")
    exact, _, exact_grads = run(op, double(arguments), cotangents)
    native, _, native_grads = run(op, arguments, cotangents)
    registry.set_policy(active)
    checked = len(outputs)
    check_errors(outputs, got[:checked], native[:checked], exact[:checked], OUTPUT)
    names = [f"gradient of {name}" for name in differentiable(arguments)]
    check_errors(names, grads, native_grads, exact_grads, GRADIENT)
    return got, grads


def check_errors(
    names: Sequence[str], got: Sequence[Tensor], native: Sequence[Tensor], exact: Sequence[Tensor], factor: int
) -> None:
    """Apply the error rule to each result, given by the provider, by the native body, and in float64."""
    problem, _ = judge(names, got, native, exact, factor)
    assert not problem, problem


def check_build(run_python: Callable[..., str], capability: str, module: str, calls: str) -> None:
    """Run statements with the compiled library's build for a CPU capability.

    calls: statements in which the test module is `t`; they run in a new process, with the seed of all tests.
    """
    program = (
        "import sys, torch; from dspnet_fast.ops import registry\n"
        f"sys.path.insert(0, 'tests/ops'); import {module} as t\n"
        "registry.set_policy('cpp')\n"
        f"assert torch.ops.dspnet_cpp.cpu_capability() == {capability!r}\n"
        f"torch.manual_seed({torch.initial_seed()})\n"
    )
    run_python("-c", program + calls, ATEN_CPU_CAPABILITY=capability.lower())
