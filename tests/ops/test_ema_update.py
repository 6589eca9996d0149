"""ema_update: every provider against a float64 reference, and rejected arguments."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.ops import apex, cpp, ema_update, registry

SIZES = (1, 7, 769, 5125, 0, 40_000)  # the last is split among threads
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TAUS = (0.0, 0.3, 0.5, 0.996, 1.0)

needs_cpp = pytest.mark.skipif(not cpp.has("ema_update")[0], reason=cpp.has("ema_update")[1])
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(params=["native", pytest.param("cpp", marks=needs_cpp)])
def provider(request, policy):
    policy(request.param)
    return request.param


def check(update, dtype: torch.dtype, tau: float, targets: list[Tensor], onlines: list[Tensor]) -> None:
    """The error rule: at most twice the error of eager PyTorch in the same dtype, plus one unit in the last place.

    The unit is that of the inputs: where they cancel, the result is smaller than the rounding errors of its terms.
    """
    exact = [tau * t.double() + (1 - tau) * o.double() for t, o in zip(targets, onlines, strict=True)]
    eager = [t.clone().lerp_(o, 1 - tau) for t, o in zip(targets, onlines, strict=True)]
    units = [
        torch.finfo(dtype).eps * torch.cat((t.flatten(), o.flatten(), t.new_zeros(1))).abs().max()
        for t, o in zip(targets, onlines, strict=True)
    ]
    before = [o.clone() for o in onlines]
    update(targets, onlines, tau)
    for got, want, same_dtype, unit, online, unchanged in zip(
        targets, exact, eager, units, onlines, before, strict=True
    ):
        assert torch.equal(online, unchanged)
        if got.numel():
            assert (got.double() - want).abs().max() <= 2 * (same_dtype.double() - want).abs().max() + unit


def pairs(dtype: torch.dtype, shapes) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(dtype) for s in shapes]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_rule_for_lists_of_odd_sizes(provider, dtype, tau):
    check(ema_update, dtype, tau, *pairs(dtype, SIZES))


def test_target_moves_by_one_minus_tau(provider):
    target, online = torch.full((9,), 2.0), torch.full((9,), 3.0)
    ema_update([target], [online], 0.999)
    torch.testing.assert_close(target, torch.full((9,), 2.001))


def test_tau_of_0_and_1_is_exact(provider):
    target, online = torch.randn(1000), torch.randn(1000) * 1e4
    kept = target.clone()
    ema_update([target], [online], 1.0)
    assert torch.equal(target, kept)
    ema_update([target], [online], 0.0)
    assert torch.equal(target, online)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_rule_for_any_strides(provider, dtype):
    full = torch.randn(33, 50).to(dtype)
    outside = full[:, 40:].clone()
    targets = [
        torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last),
        full[:, :40],  # the prefix of a slimmable weight
        torch.randn(7, 9).to(dtype).t(),
        torch.randn(20).to(dtype)[::2],
        torch.randn(()).to(dtype),
    ]
    onlines = [torch.randn(t.shape).to(dtype) for t in targets]
    onlines[0] = onlines[0].contiguous(memory_format=torch.channels_last)
    check(ema_update, dtype, 0.9, targets, onlines)
    assert torch.equal(full[:, 40:], outside)


def test_views_of_one_buffer_are_updated_independently(provider):
    flat, online = torch.randn(2, 5125), torch.randn(2, 5125)
    sizes = [1, 7, 769, 4348]
    check(ema_update, torch.float32, 0.99, list(flat[0].split(sizes)), list(online[0].split(sizes)))
    columns = torch.randn(100, 2)
    check(ema_update, torch.float32, 0.99, [columns[:, 0], columns[:, 1]], [torch.randn(100), torch.randn(100)])


def test_shared_memory_is_updated_in_list_order(provider):
    target, online = torch.zeros(50_000), torch.ones(50_000)
    ema_update([target, target], [online, online], 0.5)
    assert torch.equal(target, torch.full_like(target, 0.75))
    first, second = torch.zeros(50_000), torch.ones(50_000)
    ema_update([first, second], [online, first], 0.5)
    assert torch.equal(second, torch.full_like(second, 0.75))


def test_target_may_be_its_online_tensor(provider):
    target = torch.randn(50)
    kept = target.clone()
    ema_update([target], [target], 0.3)
    torch.testing.assert_close(target, kept)


def test_pairs_may_have_different_dtypes(provider):
    targets, onlines = zip(*(pairs(dtype, [769]) for dtype in DTYPES), strict=True)
    targets, onlines = [t[0] for t in targets], [o[0] for o in onlines]
    want = [t.clone().lerp_(o, 0.1) for t, o in zip(targets, onlines, strict=True)]
    ema_update(targets, onlines, 0.9)
    torch.testing.assert_close(targets, want)


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 3), (2, 0)]], ids=str)
def test_empty_lists_and_tensors(provider, shapes):
    targets, onlines = pairs(torch.float32, shapes)
    ema_update(targets, onlines, 0.9)
    assert [tuple(t.shape) for t in targets] == shapes


def test_nan_and_infinity_do_not_spread(provider):
    target, online = torch.zeros(769), torch.ones(769)
    online[3], online[700] = float("nan"), float("inf")
    ema_update([target], [online], 0.9)
    assert target[3].isnan() and target[700].isinf()
    assert target.isfinite().sum() == 767


def test_parameters_stay_leaves(provider):
    target, online = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    version = target.weight._version
    ema_update(list(target.parameters()), list(online.parameters()), 0.9)
    assert target.weight.is_leaf and target.weight.requires_grad
    assert target.weight._version > version  # so autograd detects that a saved tensor was overwritten


REFUSED = {
    "tau above 1": lambda t, o: ([t], [o], 1.5),
    "tau below 0": lambda t, o: ([t], [o], -0.1),
    "tau not a number": lambda t, o: ([t], [o], float("nan")),
    "lists of two lengths": lambda t, o: ([t, t.clone()], [o], 0.5),
    "shapes that would broadcast": lambda t, o: ([t], [o[:1]], 0.5),
    "dtypes that would promote": lambda t, o: ([t], [o.double()], 0.5),
    "integers": lambda t, o: ([t.int()], [o.int()], 0.5),
    "complex numbers": lambda t, o: ([t.to(torch.complex64)], [o.to(torch.complex64)], 0.5),
    "a target that overlaps itself": lambda t, o: ([t[:1].expand(4, 6)], [o], 0.5),
    "a target that overlaps its online": lambda t, o: ([t.view(-1)[:9]], [t.view(-1)[1:10]], 0.5),
    "sparse tensors": lambda t, o: ([t.to_sparse()], [o.to_sparse()], 0.5),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_rejected(provider, case):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ema_update(*REFUSED[case](torch.randn(4, 6), torch.randn(4, 6)))


@needs_cpp
@pytest.mark.parametrize("case", REFUSED)
def test_library_rejects_invalid_arguments(case):
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.dspnet_cpp.ema_update(*REFUSED[case](torch.randn(4, 6), torch.randn(4, 6)))


@needs_cpp
def test_library_rejects_another_device():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.dspnet_cpp.ema_update([torch.randn(4)], [torch.randn(4, device="meta")], 0.5)


def test_opcheck(provider):
    arguments = ([torch.randn(3, 4), torch.randn(7)], [torch.randn(3, 4, requires_grad=True), torch.randn(7)], 0.9)
    torch.library.opcheck(torch.ops.dspnet.ema_update.default, arguments)


def test_compiles_without_a_graph_break(provider):
    def step(targets, onlines, tau):
        ema_update(targets, onlines, tau)
        return targets[0] + 1

    targets, onlines = pairs(torch.float32, [7, 769])
    want = [t.lerp(o, 0.25) for t, o in zip(targets, onlines, strict=True)]
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(targets, onlines, 0.75)
    torch.testing.assert_close(targets, want)
    torch.testing.assert_close(result, want[0] + 1)


EVERY_CASE = """
import torch
from dspnet_fast.ops import ema_update, registry
from tests.ops.test_ema_update import DTYPES, SIZES, TAUS, check, pairs
registry.set_policy("cpp")
torch.set_num_threads(3)
torch.manual_seed(0)
for dtype in DTYPES:
    for tau in TAUS:
        check(ema_update, dtype, tau, *pairs(dtype, SIZES))
print(torch.ops.dspnet_cpp.cpu_capability())
"""


def test_every_cpu_capability(run_python, capability):
    assert run_python("-c", EVERY_CASE, ATEN_CPU_CAPABILITY=capability.lower()).strip() == capability


INTERPRETED = """
import torch
from kernels.ema_update import accepts, ema_update
from tests.kernels import strict_interpreter
from tests.ops.test_ema_update import SIZES, check, pairs
strict_interpreter.install()
torch.manual_seed(0)
def update(targets, onlines, tau):
    strict_interpreter.table_tensors[:] = [*targets, *onlines]
    ema_update(targets, onlines, tau)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for tau in (0.0, 0.3, 0.996, 1.0):
        targets, onlines = pairs(dtype, SIZES[:5])
        assert accepts(targets, onlines, tau) == (True, "")
        check(update, dtype, tau, targets, onlines)
    flat, online = torch.randn(5126).to(dtype), torch.randn(5126).to(dtype)
    check(update, dtype, 0.9, [flat[1:4098], flat[4098:]], [online[:4097], online[4098:]])  # not aligned
    assert flat.isfinite().all()
ema_update([], [], 0.5)
"""


@needs_triton
def test_interpreted_triton_kernel_satisfies_the_error_rule(run_python):
    run_python("-c", INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
def test_triton_kernel_rejects_unsupported_arguments_with_a_reason():
    from kernels.ema_update import accepts

    t = torch.randn(4, 6)
    assert accepts([t], [t.clone()], 0.5) == (True, "")
    for targets, onlines, tau, why in [
        ([t], [t], 2.0, "tau"),
        ([t, t], [t], 0.5, "2 targets"),
        ([t], [t.half()], 0.5, "dtypes"),
        ([t.double()], [t.double()], 0.5, "float64"),
        ([t.t()], [t.t()], 0.5, "contiguous"),
        ([t], [t[:2]], 0.5, "shapes"),
    ]:
        accepted, reason = accepts(targets, onlines, tau)
        assert not accepted and why in reason


AHEAD_OF_TIME = """
import pathlib, re, subprocess, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.ema_update import BLOCK, NUM_WARPS, ema_update_kernel
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
for architecture in (80, 90):
    for dtype in (tl.float32, tl.float16, tl.bfloat16):
        source = ASTSource(
            ema_update_kernel,
            signature={"tensors": "*i64", "blocks": "*i64", "weight": "fp32", "FROM_TARGET": "constexpr",
                       "DTYPE": "constexpr", "ALIGNED": "constexpr", "BLOCK": "constexpr"},
            constexprs={"FROM_TARGET": True, "DTYPE": dtype, "ALIGNED": True, "BLOCK": BLOCK},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": NUM_WARPS})
        assert "ld.global.v4.b32" in compiled.asm["ptx"], "loads are not 16 bytes wide"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True)
        assert " STACK:0 " in usage.stdout and " LOCAL:0 " in usage.stdout, usage.stdout + usage.stderr  # no spills
        print(architecture, dtype, re.search(r"REG:[0-9]+", usage.stdout)[0])
"""


@needs_triton
def test_triton_kernel_compiles_for_gpus_without_spills(run_python, tmp_path):
    printed = run_python("-c", AHEAD_OF_TIME, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    assert len(printed.splitlines()) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["native", "triton"])
def test_on_a_gpu(policy, name, dtype):
    if name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel does not support fp64")
    policy(name)
    for tau in TAUS:
        targets, onlines = pairs(dtype, SIZES)
        check(ema_update, dtype, tau, [t.cuda() for t in targets], [o.cuda() for o in onlines])


def axpby(chunk, overflow, lists, a, b, checked):
    """amp_C.multi_tensor_axpby: out = a x + b y."""
    for x, y, out in zip(*lists, strict=True):
        assert x.dtype == y.dtype == out.dtype and x.numel()
        out.copy_(a * x.float() + b * y.float())


@pytest.mark.parametrize("dtype", apex.DTYPES, ids=str)
@pytest.mark.parametrize("tau", TAUS)
def test_apex_call_satisfies_the_error_rule(monkeypatch, dtype, tau):
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(multi_tensor_axpby=axpby))
    check(apex.ema_update, dtype, tau, *pairs(dtype, SIZES))


def test_apex_accepts_only_contiguous_tensors_of_one_dtype():
    same = pairs(torch.float32, SIZES)
    assert apex.accepts(*same, 0.9) == (True, "")
    assert (
        "several dtypes" in apex.accepts(same[0] + [torch.zeros(3).half()], same[1] + [torch.zeros(3).half()], 0.9)[1]
    )
    assert "not fp32" in apex.accepts(*pairs(torch.float64, SIZES), 0.9)[1]
    assert "contiguous" in apex.accepts([torch.zeros(4, 3).t()], [torch.zeros(3, 4)], 0.9)[1]


@pytest.mark.skipif(apex.supported()[0], reason="NVIDIA's apex can run here")
def test_apex_chosen_by_name_is_an_error_where_unavailable():
    with pytest.raises(InputError, match="apex"):
        registry.set_policy("apex")
