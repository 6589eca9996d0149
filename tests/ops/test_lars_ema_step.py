"""lars_ema_step: every provider against its formulas per tensor in float64, and rejected arguments."""

import functools

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import cpp, lars_ema_step
from tests.ops import flat_steps
from tests.ops.flat_steps import DTYPES, FLAT, LAYOUTS, copy

OPTIONS = {"weight_decay": 0.03, "momentum": 0.8, "eta": 0.02}
SCALES = {"params": 1, "grads": 0.01, "momenta": 0.1}
BUFFERS = (*SCALES, "targets")

needs_cpp = pytest.mark.skipif(not cpp.has("lars_ema_step")[0], reason=cpp.has("lars_ema_step")[1])
step = functools.partial(lars_ema_step, **OPTIONS)


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


def make(layout: str, dtype: torch.dtype, device: str = "cpu") -> dict:
    """The operator's arguments up to tau."""
    return flat_steps.make(layout, dtype, SCALES, {"lr": 0.4, "tau": 0.99}, device)


def reference(p, g, m, adapted, lr, momentum, weight_decay, eta):
    """The step of one tensor: returns its new value and momentum."""
    if adapted:
        g = g + weight_decay * p
        if p.norm() != 0 and g.norm() != 0:
            g = eta * p.norm() / g.norm() * g
    m = momentum * m + g
    return p - lr * m, m


def expected(layout: str, arguments: dict, options: dict = OPTIONS) -> dict[str, Tensor]:
    """The buffers after the step, in float64."""
    sizes, adapted = zip(*LAYOUTS[layout][0]) if LAYOUTS[layout][0] else ((), ())
    pieces = zip(*(arguments[name].double().split(sizes) for name in SCALES)) if sizes else ()
    done = [reference(*piece, a, arguments["lr"], **options) for piece, a in zip(pieces, adapted)]
    params, momenta = (torch.cat([*(d[i] for d in done), torch.zeros(0).to(arguments["params"])]) for i in range(2))
    tau, targets = arguments["tau"], arguments["targets"].double()
    targets = tau * targets + (1 - tau) * params[: len(targets)]
    return {"params": params, "grads": torch.zeros_like(params), "momenta": momenta, "targets": targets}


def check(layout: str, arguments: dict, step=lars_ema_step, **options) -> dict:
    """The error rule: at most twice the error of the native body in the same dtype, plus one unit in the last place.

    In float64 the reference is no more precise than the provider: there both may differ by rounding.
    """
    options = {**OPTIONS, **options}
    want = expected(layout, arguments, options)
    eager, got = copy(arguments), copy(arguments)
    lars_ema_step.native(**eager, **options)
    step(**got, **options)
    for name in BUFFERS:
        if got[name].numel():
            unit = torch.finfo(got[name].dtype).eps * torch.cat((arguments[name], want[name])).abs().max()
            error, same_dtype = ((result[name].double() - want[name]).abs().max() for result in (got, eager))
            assert max(error, same_dtype) <= 20 * unit, name  # bounds the native body's error too
            assert error <= 2 * same_dtype + unit or got[name].dtype == torch.float64, name
    assert not got["grads"].count_nonzero()
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_equal_the_formulas(provider, dtype, layout):
    check(layout, make(layout, dtype))


def test_three_steps_equal_the_formulas(provider):
    layout = "odd sizes"
    arguments = make(layout, torch.float64)
    for lr, tau in ((0.5, 0.9), (0.4, 0.95), (0.3, 1.0)):
        arguments |= {"lr": torch.tensor(lr), "tau": torch.tensor(tau)}
        arguments["grads"].normal_()
        want = expected(layout, arguments)
        step(**arguments)
        for name in BUFFERS:
            torch.testing.assert_close(arguments[name], want[name])


@pytest.mark.parametrize("zeroed", ["params", "grads", "params and grads"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_trust_ratio_is_one_if_a_norm_is_zero(provider, zeroed, weight_decay):
    arguments = make("odd sizes", torch.float32)
    for name in zeroed.split(" and "):
        arguments[name][7 : 7 + 769] = 0
    got = check("odd sizes", arguments, weight_decay=weight_decay)
    assert all(got[name].isfinite().all() for name in BUFFERS)


def test_zero_gradient_without_decay_changes_nothing(provider):
    arguments = make("odd sizes", torch.float32)
    arguments["grads"].zero_()
    arguments["momenta"].zero_()
    before = arguments["params"].clone()
    lars_ema_step(**arguments, weight_decay=0.0, momentum=0.9, eta=0.02)
    assert torch.equal(arguments["params"], before)


def test_norm_of_tiny_gradients_does_not_underflow(provider):
    arguments = make("only adapted", torch.float32)
    arguments["grads"] *= 1e-24  # their squares underflow in fp32
    arguments["momenta"].zero_()
    lars_ema_step(**arguments, weight_decay=0.0, momentum=0.0, eta=0.02)
    norm = arguments["momenta"].double().norm()
    if provider == "native":
        assert norm.isfinite()  # as in eager PyTorch the norm may underflow to 0, and the ratio is 1
    else:
        assert norm > 0.1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradient_spreads_in_its_segment_only(provider, poison):
    arguments = make("split between threads", torch.float32)
    clean = copy(arguments)
    step(**clean)
    arguments["grads"][60_000] = poison
    step(**arguments)
    segment = slice(100, 100 + 70_001)
    for name in ("params", "momenta", "targets"):
        assert arguments[name][60_000].isnan()
        arguments[name][segment] = clean[name][segment]
    for name in BUFFERS:
        assert torch.equal(arguments[name], clean[name])
    assert not arguments["grads"].count_nonzero()


REFUSED = {
    "gradients of another length": lambda a: {"grads": a["grads"][1:]},
    "momenta of another length": lambda a: {"momenta": torch.zeros(FLAT + 1)},
    "more targets than parameters": lambda a: {"targets": torch.zeros(FLAT + 1)},
    "matrices": lambda a: {name: a[name].view(4, -1) for name in SCALES},
    "buffers with gaps": lambda a: {"momenta": torch.zeros(2 * FLAT)[::2]},
    "one element expanded": lambda a: {"grads": torch.zeros(1).expand(FLAT)},
    "dtypes that would promote": lambda a: {"grads": a["grads"].double()},
    "half precision": lambda a: {name: a[name].half() for name in BUFFERS},
    "integers": lambda a: {name: a[name].int() for name in BUFFERS},
    "complex numbers": lambda a: {name: a[name].to(torch.complex64) for name in BUFFERS},
    "sparse gradients": lambda a: {"grads": a["grads"].to_sparse()},
    "gradients that are the parameters": lambda a: {"grads": a["params"]},
    "momenta that are the gradients": lambda a: {"momenta": a["grads"]},
    "targets within the parameters": lambda a: {"targets": a["params"][-5:]},
    "targets that overlap the momenta": lambda a: {"targets": a["momenta"][:50]},
    "more starts than sizes": lambda a: {"starts": [0, 7], "sizes": [7]},
    "more sizes than starts": lambda a: {"starts": [0], "sizes": [7, 8]},
    "a segment before the beginning": lambda a: {"starts": [-1], "sizes": [7]},
    "a segment of negative size": lambda a: {"starts": [9], "sizes": [-1]},
    "a segment beyond the end": lambda a: {"starts": [FLAT - 6], "sizes": [7]},
    "a segment that starts beyond the end": lambda a: {"starts": [FLAT + 1], "sizes": [0]},
    "a segment whose end overflows": lambda a: {"starts": [5], "sizes": [2**63 - 1]},
    "segments that overlap": lambda a: {"starts": [0, 6], "sizes": [7, 7]},
    "segments that descend": lambda a: {"starts": [100, 0], "sizes": [7, 7]},
    "a vector for lr": lambda a: {"lr": torch.ones(1)},
    "an integer for tau": lambda a: {"tau": torch.tensor(1)},
    "a number for apply": lambda a: {"apply": torch.tensor(1.0)},
    "a vector for apply": lambda a: {"apply": torch.ones(1, dtype=torch.bool)},
    "a complex lr": lambda a: {"lr": torch.tensor(1j)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_rejected(provider, case):
    arguments = make("odd sizes", torch.float32)
    before = copy(arguments)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(**arguments | REFUSED[case](arguments))
    assert all(torch.equal(arguments[name], before[name]) for name in BUFFERS)


@needs_cpp
@pytest.mark.parametrize("case", REFUSED)
def test_library_rejects_invalid_arguments(case):
    arguments = make("odd sizes", torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.dspnet_cpp.lars_ema_step(**arguments | REFUSED[case](arguments), **OPTIONS)


@pytest.mark.parametrize("name", [*BUFFERS, "lr", "tau", "apply"])
@pytest.mark.parametrize("library", [False, pytest.param(True, marks=needs_cpp)])
def test_another_device_is_rejected(library, name):
    arguments = make("odd sizes", torch.float32) | {"apply": torch.tensor(True)}
    step = torch.ops.dspnet_cpp.lars_ema_step if library else lars_ema_step.native
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(**arguments | {name: arguments[name].to("meta")}, **OPTIONS)


@needs_cpp
@pytest.mark.parametrize("name", [*BUFFERS, "lr", "tau", "apply"])
def test_library_rejects_tensors_without_storage(name):
    arguments = make("odd sizes", torch.float32) | {"apply": torch.tensor(True)}
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        torch.ops.dspnet_cpp.lars_ema_step(**arguments, **OPTIONS)


@pytest.mark.parametrize("layout", ["odd sizes", "nothing"])
def test_opcheck(provider, layout):
    torch.library.opcheck(torch.ops.dspnet.lars_ema_step.default, (), {**make(layout, torch.float32), **OPTIONS})


def test_compiles_without_a_graph_break(provider):
    def update(arguments):
        step(**arguments)
        return arguments["params"] + 1

    arguments = make("odd sizes", torch.float64)
    want = expected("odd sizes", arguments)
    result = torch.compile(update, fullgraph=True, backend="aot_eager")(arguments)
    for name in BUFFERS:
        torch.testing.assert_close(arguments[name], want[name])
    torch.testing.assert_close(result, want["params"] + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_on_a_gpu_does_not_synchronise(policy, dtype):
    policy("native")
    arguments = make("split between threads", dtype, "cuda")
    given = copy(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check("split between threads", arguments)
