"""adamw_ema_step: every provider against torch.optim.AdamW and the formulas in float64, and rejected arguments."""

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import adamw_ema_step, cpp
from tests.ops.test_lars_ema_step import DTYPES, LAYOUTS, copy

OPTIONS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
VECTORS = ("params", "grads", "momenta", "variances")
BUFFERS = (*VECTORS, "targets", "steps")

needs_cpp = pytest.mark.skipif(not cpp.has("adamw_ema_step")[0], reason=cpp.has("adamw_ema_step")[1])


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


def make(layout: str, dtype: torch.dtype, done: int = 3) -> dict:
    """The operator's arguments up to tau, after `done` steps."""
    tensors, with_target = LAYOUTS[layout]
    starts, sizes, total = [], [], 0
    for size, decayed in tensors:
        if decayed:
            starts.append(total)
            sizes.append(size)
        total += size
    buffers = {name: scale * torch.randn(total, dtype=dtype) for name, scale in zip(VECTORS, (1, 0.01, 0.01, 0.01))}
    buffers["variances"].square_()
    scalars = {"lr": 0.01, "weight_decay": 0.3, "tau": 0.99}
    return {
        **buffers,
        "targets": torch.randn(with_target, dtype=dtype),
        "steps": torch.tensor(float(done), dtype=torch.float64),
        "starts": starts,
        "sizes": sizes,
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()},
    }


def expected(layout: str, arguments: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The buffers after the step, by the formulas."""
    p, g, m, v = (arguments[name].to(dtype) for name in VECTORS)
    decayed = torch.cat([torch.full((size,), is_decayed) for size, is_decayed in LAYOUTS[layout][0]] or [p.bool()])
    t, lr, tau = arguments["steps"] + 1, arguments["lr"], arguments["tau"].to(dtype)
    p = torch.where(decayed, p * (1 - lr * arguments["weight_decay"]).to(dtype), p)
    m = OPTIONS["beta1"] * m + (1 - OPTIONS["beta1"]) * g
    v = OPTIONS["beta2"] * v + (1 - OPTIONS["beta2"]) * g**2
    step_size = (lr / (1 - OPTIONS["beta1"] ** t)).to(dtype)
    p = p - step_size * m / ((v / (1 - OPTIONS["beta2"] ** t).to(dtype)).sqrt() + OPTIONS["eps"])
    targets = tau * arguments["targets"].to(dtype) + (1 - tau) * p[: len(arguments["targets"])]
    zero = torch.zeros_like(p)
    return {"params": p, "grads": zero, "momenta": m, "variances": v, "targets": targets, "steps": t}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("done", [0, 1000])
def test_buffers_equal_the_formulas(provider, dtype, layout, done):
    """The error rule: at most twice the error of the formulas in the same dtype, plus four units in the last place."""
    arguments = make(layout, dtype, done)
    exact, plain = expected(layout, arguments), expected(layout, arguments, dtype)
    got = copy(arguments)
    adamw_ema_step(**got, **OPTIONS)
    largest = max((value.abs().max().item() for value in exact.values() if value.numel()), default=0.0)
    for name in BUFFERS:
        error, allowed = ((value[name].double() - exact[name]).abs() for value in (got, plain))
        unit = torch.finfo(dtype).eps * largest
        assert got[name].dtype == arguments[name].dtype and got[name].isfinite().all()
        assert not error.numel() or error.max() <= 2 * allowed.max() + 4 * unit, name
    assert not got["grads"].count_nonzero() and got["steps"] == done + 1


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_equal_adamw_of_pytorch(provider, decay):
    """With a schedule of learning rate and weight decay; tensors of one dimension are not decayed."""
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape).double()) for shape in ((7, 5), (9,)))
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=OPTIONS["eps"])
    flat = torch.cat([weight.detach().flatten(), bias.detach()])
    buffers = {name: torch.zeros_like(flat) for name in VECTORS} | {"params": flat, "targets": flat[:0].clone()}
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("done", [0, 3])
def test_step_without_apply_only_zeroes_the_gradients(provider, dtype, layout, done):
    """With `apply` true the step is bitwise the ordinary one; with false only the gradients change, even if NaN."""
    arguments = make(layout, dtype, done)
    applied, want = copy(arguments), copy(arguments)
    adamw_ema_step(**want, **OPTIONS)
    adamw_ema_step(**applied, **OPTIONS, apply=torch.tensor(True))
    assert all(torch.equal(applied[name], want[name]) for name in BUFFERS)
    kept = copy(arguments)
    kept["grads"][::3] = float("nan")
    adamw_ema_step(**kept, **OPTIONS, apply=torch.tensor(False))
    assert not kept["grads"].count_nonzero()
    assert all(torch.equal(kept[name], arguments[name]) for name in BUFFERS if name != "grads")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradient_spreads_to_no_other_element(provider, poison):
    arguments = make("split between threads", torch.float32)
    clean = copy(arguments)
    adamw_ema_step(**clean, **OPTIONS)
    arguments["grads"][60_000] = poison
    adamw_ema_step(**arguments, **OPTIONS)
    for name in ("params", "momenta", "variances", "targets"):
        assert not arguments[name][60_000].isfinite()
        arguments[name][60_000] = clean[name][60_000]
        assert torch.equal(arguments[name], clean[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tau_of_0_and_1_is_exact(provider, dtype):
    arguments = make("split between threads", dtype)
    kept = arguments["targets"].clone()
    adamw_ema_step(**arguments | {"tau": torch.tensor(1.0)}, **OPTIONS)
    assert torch.equal(arguments["targets"], kept)
    adamw_ema_step(**arguments | {"tau": torch.tensor(0.0)}, **OPTIONS)
    assert torch.equal(arguments["targets"], arguments["params"][: len(kept)])


@needs_cpp
def test_results_are_bitwise_equal_for_any_number_of_threads(policy):
    policy("cpp")
    arguments, threads, results = make("split between threads", torch.float32), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(copy(arguments))
            adamw_ema_step(**results[-1], **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in BUFFERS)


def test_unaligned_slices_of_one_buffer(provider):
    arguments, memory = make("odd sizes", torch.float32), torch.full((100_000,), 5.0)
    offset = 3
    for name in (*VECTORS, "targets"):
        size = len(arguments[name])
        arguments[name] = memory[offset : offset + size].copy_(arguments[name])
        offset += size
    want = expected("odd sizes", arguments)
    adamw_ema_step(**arguments, **OPTIONS)
    for name in (*VECTORS, "targets"):
        torch.testing.assert_close(arguments[name].double(), want[name], rtol=1e-5, atol=1e-6)
    assert memory[:3].eq(5).all() and memory[offset:].eq(5).all()


def test_opcheck(policy):
    policy("native")
    torch.library.opcheck(torch.ops.dspnet.adamw_ema_step.default, (), {**make("odd sizes", torch.float32), **OPTIONS})


FLAT = 10_036  # elements of the layout "odd sizes"
REFUSED = {
    "gradients of another length": lambda a: {"grads": a["grads"][1:]},
    "variances of another length": lambda a: {"variances": torch.zeros(FLAT + 1)},
    "more targets than parameters": lambda a: {"targets": torch.zeros(FLAT + 1)},
    "buffers with gaps": lambda a: {"variances": torch.zeros(2 * FLAT)[::2]},
    "dtypes that would promote": lambda a: {"variances": a["variances"].double()},
    "half precision": lambda a: {name: a[name].half() for name in (*VECTORS, "targets")},
    "variances that are the momenta": lambda a: {"variances": a["momenta"]},
    "targets within the variances": lambda a: {"targets": a["variances"][-5:]},
    "more starts than sizes": lambda a: {"starts": [0, 7], "sizes": [7]},
    "a segment beyond the end": lambda a: {"starts": [FLAT - 6], "sizes": [7]},
    "a segment whose end overflows": lambda a: {"starts": [5], "sizes": [2**63 - 1]},
    "segments that overlap": lambda a: {"starts": [0, 6], "sizes": [7, 7]},
    "a vector for lr": lambda a: {"lr": torch.ones(1)},
    "an integer for steps": lambda a: {"steps": torch.tensor(1)},
    "a number for weight_decay": lambda a: {"weight_decay": torch.tensor(1)},
    "a number for apply": lambda a: {"apply": torch.tensor(1.0)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_rejected(provider, case):
    arguments = make("odd sizes", torch.float32)
    before = copy(arguments)
    with pytest.raises((RuntimeError, NotImplementedError)):
        adamw_ema_step(**arguments | REFUSED[case](arguments), **OPTIONS)
    assert all(torch.equal(arguments[name], before[name]) for name in BUFFERS)
