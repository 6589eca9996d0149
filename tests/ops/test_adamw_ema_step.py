"""adamw_ema_step: every provider against torch.optim.AdamW and the formulas in float64, and rejected arguments."""

import functools

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import adamw_ema_step, cpp
from tests.ops import flat_steps
from tests.ops.flat_steps import DTYPES, FLAT, LAYOUTS, copy

OPTIONS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
SCALES = {"params": 1, "grads": 0.01, "momenta": 0.01, "variances": 0.01}
VECTORS = (*SCALES, "targets")
BUFFERS = (*VECTORS, "steps")

needs_cpp = pytest.mark.skipif(not cpp.has("adamw_ema_step")[0], reason=cpp.has("adamw_ema_step")[1])
step = functools.partial(adamw_ema_step, **OPTIONS)


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


def make(layout: str, dtype: torch.dtype, device: str = "cpu", done: int = 3) -> dict:
    """The operator's arguments up to tau, after `done` steps."""
    scalars = {"steps": float(done), "lr": 0.01, "weight_decay": 0.3, "tau": 0.99}
    arguments = flat_steps.make(layout, dtype, SCALES, scalars, device)
    arguments["variances"].square_()
    return arguments


def expected(layout: str, arguments: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The buffers after the step, by the formulas."""
    p, g, m, v = (arguments[name].to(dtype) for name in SCALES)
    decayed = torch.cat([torch.full((size,), is_decayed) for size, is_decayed in LAYOUTS[layout][0]] or [p.bool()])
    t, lr, decay = (arguments[name].double() for name in ("steps", "lr", "weight_decay"))
    t, tau = t + 1, arguments["tau"].to(dtype)
    p = torch.where(decayed, p * (1 - lr * decay).to(dtype), p)
    m = OPTIONS["beta1"] * m + (1 - OPTIONS["beta1"]) * g
    v = OPTIONS["beta2"] * v + (1 - OPTIONS["beta2"]) * g**2
    step_size = (lr / (1 - OPTIONS["beta1"] ** t)).to(dtype)
    p = p - step_size * m / ((v / (1 - OPTIONS["beta2"] ** t).to(dtype)).sqrt() + OPTIONS["eps"])
    targets = tau * arguments["targets"].to(dtype) + (1 - tau) * p[: len(arguments["targets"])]
    zero = torch.zeros_like(p)
    return {"params": p, "grads": zero, "momenta": m, "variances": v, "targets": targets, "steps": t}


def check(layout: str, arguments: dict, step=adamw_ema_step) -> None:
    """The error rule: at most twice the error of the formulas in the same dtype, plus four units in the last place."""
    dtype = arguments["params"].dtype
    exact, plain = expected(layout, arguments), expected(layout, arguments, dtype)
    got = copy(arguments)
    step(**got, **OPTIONS)
    largest = max((value.abs().max().item() for value in exact.values() if value.numel()), default=0.0)
    for name in BUFFERS:
        error, allowed = ((value[name].double() - exact[name]).abs() for value in (got, plain))
        unit = torch.finfo(dtype).eps * largest
        assert got[name].dtype == arguments[name].dtype and got[name].isfinite().all()
        assert not error.numel() or error.max() <= 2 * allowed.max() + 4 * unit, name
    assert not got["grads"].count_nonzero() and got["steps"] == arguments["steps"] + 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("done", [0, 1000])
def test_buffers_equal_the_formulas(provider, dtype, layout, done):
    check(layout, make(layout, dtype, done=done))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_equal_adamw_of_pytorch(provider, decay):
    """With a schedule of learning rate and weight decay; tensors of one dimension are not decayed."""
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape).double()) for shape in ((7, 5), (9,)))
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=OPTIONS["eps"])
    flat = torch.cat([weight.detach().flatten(), bias.detach()])
    buffers = {name: torch.zeros_like(flat) for name in SCALES} | {"params": flat, "targets": flat[:0].clone()}
    steps = torch.zeros((), dtype=torch.float64)
    for step in range(5):
        lr = 0.1 / (step + 1)
        theirs.param_groups[0].update(lr=lr, weight_decay=decay * step)
        theirs.param_groups[1].update(lr=lr)
        for parameter in (weight, bias):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (2 - step)
        buffers["grads"] = torch.cat([weight.grad.flatten(), bias.grad])
        theirs.step()
        scalars = (torch.tensor(value, dtype=torch.float64) for value in (lr, decay * step, 0.5))
        adamw_ema_step(
            **buffers,
            steps=steps,
            starts=[0],
            sizes=[35],
            **dict(zip(("lr", "weight_decay", "tau"), scalars)),
            **OPTIONS,
        )
        torch.testing.assert_close(flat, torch.cat([weight.detach().flatten(), bias.detach()]), rtol=1e-12, atol=1e-13)
    assert steps == 5


def test_first_step_without_apply_only_zeroes_the_gradients(provider):
    flat_steps.check_apply(step, make("odd sizes", torch.float32, done=0), BUFFERS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradient_spreads_to_no_other_element(provider, poison):
    arguments = make("split between threads", torch.float32)
    clean = copy(arguments)
    step(**clean)
    arguments["grads"][60_000] = poison
    step(**arguments)
    for name in ("params", "momenta", "variances", "targets"):
        assert not arguments[name][60_000].isfinite()
        arguments[name][60_000] = clean[name][60_000]
        assert torch.equal(arguments[name], clean[name])


def test_opcheck(policy):
    policy("native")
    torch.library.opcheck(torch.ops.dspnet.adamw_ema_step.default, (), {**make("odd sizes", torch.float32), **OPTIONS})


# Arguments that lars_ema_step does not have; its test has all other ones.
REFUSED = {
    "variances of another length": lambda a: {"variances": torch.zeros(FLAT + 1)},
    "variances with gaps": lambda a: {"variances": torch.zeros(2 * FLAT)[::2]},
    "variances of another dtype": lambda a: {"variances": a["variances"].double()},
    "variances that are the momenta": lambda a: {"variances": a["momenta"]},
    "targets within the variances": lambda a: {"targets": a["variances"][-5:]},
    "segments that overlap": lambda a: {"starts": [0, 6], "sizes": [7, 7]},
    "an integer for steps": lambda a: {"steps": torch.tensor(1)},
    "a vector for weight_decay": lambda a: {"weight_decay": torch.ones(1)},
    "a number for apply": lambda a: {"apply": torch.tensor(1.0)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_rejected(provider, case):
    arguments = make("odd sizes", torch.float32)
    before = copy(arguments)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(**arguments | REFUSED[case](arguments))
    assert all(torch.equal(arguments[name], before[name]) for name in BUFFERS)
