"""The provider `cuda` on a GPU: numerical errors, streams, CUDA graphs, synchronisation, rejected arguments."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dspnet_fast.ops import adamw_ema_step, cuda, ema_update, lars_ema_step, normalized_mse
from dspnet_fast.ops.normalized_mse import EPS, normalized_mse_backward
from tests.ops import test_adamw_ema_step as adamw_rules
from tests.ops import test_ema_update as ema_rules
from tests.ops import test_lars_ema_step as lars_rules
from tests.ops import test_normalized_mse as mse_rules
from tests.ops.flat_steps import check_apply

pytestmark = pytest.mark.skipif(not cuda.supported()[0], reason=cuda.supported()[1])

FLAT_STEPS = {"lars_ema_step": (lars_ema_step, lars_rules), "adamw_ema_step": (adamw_ema_step, adamw_rules)}
FP32 = {"device": "cuda", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def cuda_provider(policy):
    policy("cuda")


@pytest.fixture
def forbid_synchronization():
    """A function after whose call every synchronisation with the device raises an error."""
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(tensors) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def lars_arguments(layout="odd sizes", dtype=torch.float32) -> dict:
    return lars_rules.make(layout, dtype, "cuda")


def lars_buffers(arguments: dict) -> list[Tensor]:
    return [arguments[name] for name in lars_rules.BUFFERS]


# --- Numerical errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", ema_rules.TAUS)
@pytest.mark.parametrize("dtype", ema_rules.DTYPES, ids=str)
def test_ema_update_matches_reference(dtype, tau):
    shapes = [*ema_rules.SIZES, *range(1, 150), (6, 5, 3, 3)]  # more than the pairs of one launch
    targets, onlines = map(on_gpu, ema_rules.pairs(dtype, shapes))
    ema_rules.check(ema_update, dtype, tau, targets, onlines)


@pytest.mark.parametrize("dtype", ema_rules.DTYPES, ids=str)
def test_ema_update_supports_any_strides_and_alignments(dtype):
    memory = torch.randn(50, 33, device="cuda").to(dtype)
    targets = [torch.randn(7, 9, device="cuda").to(dtype).t(), memory[:40, 1:30], memory[41, 1:30], memory[42]]
    onlines = [torch.randn(t.shape, device="cuda").to(dtype) for t in targets]
    ema_rules.check(ema_update, dtype, 0.9, targets, onlines)


def test_ema_update_supports_mixed_dtypes_and_shared_memory():
    pairs = [ema_rules.pairs(dtype, [769]) for dtype in ema_rules.DTYPES]
    targets, onlines = ([pair[i][0].cuda() for pair in pairs] for i in range(2))
    want = [t.clone().lerp_(o, 0.1) for t, o in zip(targets, onlines)]
    ema_update(targets, onlines, 0.9)
    torch.testing.assert_close(targets, want)
    target, online = torch.zeros(50_000, **FP32), torch.ones(50_000, **FP32)
    ema_update([target, target], [online, online], 0.5)
    assert target.eq(0.75).all()


@pytest.fixture(params=FLAT_STEPS)
def flat_step(request):
    """An operator that updates flat buffers, and its test module."""
    return FLAT_STEPS[request.param]


@pytest.mark.parametrize("layout", lars_rules.LAYOUTS)
@pytest.mark.parametrize("dtype", lars_rules.DTYPES, ids=str)
def test_flat_step_matches_reference(flat_step, dtype, layout):
    _, rules = flat_step
    for tau in (0.0, 0.3, 0.996, 1.0):
        rules.check(layout, rules.make(layout, dtype, "cuda") | {"tau": torch.tensor(tau, **FP32)})
    check_apply(rules.step, rules.make(layout, dtype, "cuda"), rules.BUFFERS)


@pytest.mark.parametrize("dtype", lars_rules.DTYPES, ids=str)
def test_flat_step_supports_more_regions_than_one_launch(flat_step, dtype, monkeypatch):
    _, rules = flat_step
    layout = [(i % 6 + 1 if i % 100 else 20_000, i % 7 > 0) for i in range(700)]
    monkeypatch.setitem(rules.LAYOUTS, "many", (layout, 100_000))
    rules.check("many", rules.make("many", dtype, "cuda"))


@pytest.mark.parametrize("offsets", [(1, 1, 1), (1, 2, 1), (4, 4, 2)], ids=str)
def test_flat_step_supports_misaligned_buffers(flat_step, offsets):
    step, rules = flat_step
    arguments = rules.make("odd sizes", torch.float32, "cuda")
    vectors = {name: offsets[1] for name in rules.SCALES} | {"params": offsets[0], "targets": offsets[2]}
    memory = {name: torch.full((10_200,), 5.0, **FP32) for name in vectors}
    for name, offset in vectors.items():
        arguments[name] = memory[name][offset : offset + len(arguments[name])].copy_(arguments[name])
    want = rules.expected("odd sizes", arguments)
    step(**arguments, **rules.OPTIONS)
    for name, offset in vectors.items():
        torch.testing.assert_close(arguments[name].double(), want[name], rtol=1e-5, atol=1e-6)
        assert memory[name][:offset].eq(5).all() and memory[name][offset + len(arguments[name]) :].eq(5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_flat_step_accepts_scalars_of_any_dtype(flat_step, dtype):
    _, rules = flat_step
    arguments = rules.make("odd sizes", torch.float32, "cuda")
    values = {"lr": 0.375, "tau": 0.75, "weight_decay": 0.25, "steps": 5.0}
    scalars = {name: torch.tensor(value, dtype=dtype).cuda() for name, value in values.items() if name in arguments}
    rules.check("odd sizes", arguments | scalars)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradient_changes_only_its_segment(poison):
    arguments = lars_arguments("split between threads")
    clean = lars_rules.copy(arguments)
    lars_ema_step(**clean, **lars_rules.OPTIONS)
    arguments["grads"][60_000] = poison
    lars_ema_step(**arguments, **lars_rules.OPTIONS)
    segment = slice(100, 100 + 70_001)
    for name in ("params", "momenta", "targets"):
        assert arguments[name][60_000].isnan()
        arguments[name][segment] = clean[name][segment]
    assert all(torch.equal(*pair) for pair in zip(lars_buffers(arguments), lars_buffers(clean)))


@pytest.mark.parametrize("dtype", mse_rules.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*mse_rules.SHAPES, (8192, 256), (2048, 4096)], ids=str)
def test_normalized_mse_matches_reference(shape, dtype, nan_filled):
    mse_rules.check(*on_gpu(mse_rules.inputs(shape, dtype)))


def test_normalized_mse_supports_strided_empty_and_zero_inputs():
    mse_rules.check(torch.randn(10, 20, **FP32)[:, :7], torch.randn(7, 10, **FP32).t())
    assert normalized_mse(torch.empty(0, 5, **FP32), torch.empty(0, 5, **FP32)).isnan()
    assert normalized_mse(torch.empty(3, 0, **FP32), torch.empty(3, 0, **FP32)) == 2
    p = torch.zeros(2, 5, **FP32, requires_grad=True)
    loss = normalized_mse(p, torch.randn(2, 5, **FP32))
    loss.backward()
    assert loss == 2 and p.grad.isfinite().all()
    short, z = EPS / 10 * normalize(torch.randn(7, 40, **FP32)), torch.randn(7, 40, **FP32)
    gradient, _ = normalized_mse_backward(loss.detach(), short, z, True, False)
    torch.testing.assert_close(gradient, loss.detach() * -2 / 7 / EPS * normalize(z))


def test_operators_pass_opcheck():
    one, (p, z) = torch.ones((), **FP32), on_gpu(mse_rules.inputs((7, 9), torch.float32))
    torch.library.opcheck(torch.ops.dspnet.normalized_mse.default, (p, z))
    torch.library.opcheck(torch.ops.dspnet.normalized_mse_backward.default, (one, p.detach(), z.detach(), True, False))
    torch.library.opcheck(torch.ops.dspnet.ema_update.default, ([p.detach()], [z], 0.9))
    for name, (_, rules) in FLAT_STEPS.items():
        arguments = rules.make("odd sizes", torch.float32, "cuda")
        torch.library.opcheck(getattr(torch.ops.dspnet, name).default, (), {**arguments, **rules.OPTIONS})


# --- Reproducibility, streams, CUDA graphs, synchronisation -----------------------------------------------------------


class AllOperators:
    """One call of each operator on tensors with fixed addresses."""

    def __init__(self) -> None:
        self.lars = lars_arguments("split between threads")
        self.adamw = adamw_rules.make("split between threads", torch.float32, "cuda")
        self.targets, self.onlines = map(on_gpu, ema_rules.pairs(torch.float32, ema_rules.SIZES))
        self.p, self.z = (v.detach() for v in on_gpu(mse_rules.inputs((130, 256), torch.float32)))
        self.one = torch.ones((), **FP32)
        self.written = [*lars_buffers(self.lars), *(self.adamw[name] for name in adamw_rules.BUFFERS), *self.targets]
        self.start = [tensor.clone() for tensor in self.written]
        self.results: tuple[Tensor, ...] = ()

    def reset(self) -> None:
        for tensor, start in zip(self.written, self.start):
            tensor.copy_(start)

    def run(self) -> None:
        lars_ema_step(**self.lars, **lars_rules.OPTIONS)
        adamw_ema_step(**self.adamw, **adamw_rules.OPTIONS)
        ema_update(self.targets, self.onlines, 0.9)
        loss = normalized_mse(self.p, self.z)
        self.results = (loss, *normalized_mse_backward(self.one, self.p, self.z, True, True))

    def outputs(self) -> list[Tensor]:
        return [tensor.clone() for tensor in (*self.written, *self.results)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_results_are_bitwise_reproducible():
    operators = AllOperators()
    operators.run()
    expected = operators.outputs()
    operators.reset()
    operators.run()
    assert equal(operators.outputs(), expected)


def test_kernels_run_on_the_current_stream():
    operators = AllOperators()
    operators.run()
    expected = operators.outputs()
    for tensor in operators.written:
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # delays the inputs: a kernel on another stream would read NaN
        operators.reset()
        operators.run()
        outputs = operators.outputs()
    stream.synchronize()
    assert equal(outputs, expected)


def test_cuda_graph_replays_with_changed_inputs():
    operators = AllOperators()
    operators.run()  # warm-up: the first call loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operators.run()
    for lr, tau in ((0.4, 0.99), (0.2, 0.3), (0.0, 1.0)):
        for arguments in (operators.lars, operators.adamw):
            arguments["lr"].fill_(lr)
            arguments["tau"].fill_(tau)
        operators.p.normal_()
        operators.reset()
        graph.replay()
        replayed = operators.outputs()
        captured, operators.results = operators.results, ()
        operators.reset()
        operators.run()
        assert equal(replayed, operators.outputs()), (lr, tau)
        operators.results = captured


def test_operators_do_not_synchronize(forbid_synchronization):
    operators = AllOperators()
    forbid_synchronization()
    operators.run()
    p = operators.p.requires_grad_()
    normalized_mse(p, operators.z).backward()


def test_tensors_may_exceed_2_to_the_31_elements():
    size = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("requires 16 GiB of free GPU memory")
    target, online = (torch.full((size,), value, device="cuda", dtype=torch.bfloat16) for value in (0.0, 1.0))
    ema_update([target], [online], 0.5)
    assert all(part.eq(0.5).all() for part in target.split(2**28))
    del target, online
    p, z = (torch.ones(2**24 + 3, 129, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    p[-1] = -1
    loss = normalized_mse(p, z)
    torch.testing.assert_close(loss.item(), 4 / (2**24 + 3), rtol=1e-4, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two devices")
def test_tensors_may_be_on_a_device_that_is_not_current():
    p, z = (v.detach().to("cuda:1") for v in mse_rules.inputs((130, 256), torch.float32))
    mse_rules.check(p, z)
    ema_rules.check(ema_update, torch.float32, 0.9, [p.clone(), p.cuda(0)], [z, z.cuda(0)])
    assert torch.cuda.current_device() == 0


# --- Rejected arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, (_, rules) in FLAT_STEPS.items() for c in rules.REFUSED])
def test_flat_step_rejects_invalid_arguments(name, case):
    step, rules = FLAT_STEPS[name]
    arguments = rules.make("odd sizes", torch.float32, "cuda")
    before = rules.copy(arguments)
    changed = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in rules.REFUSED[case](arguments).items()}
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(**arguments | changed, **rules.OPTIONS)
    assert all(torch.equal(arguments[name], before[name]) for name in rules.BUFFERS)


@pytest.mark.parametrize("name", [*adamw_rules.BUFFERS, "lr", "weight_decay", "tau"])
@pytest.mark.parametrize("fault", ["on the CPU", "storage of size 0"])
def test_flat_step_rejects_tensor_without_gpu_memory(flat_step, fault, name):
    step, rules = flat_step
    arguments = rules.make("odd sizes", torch.float32, "cuda")
    if name not in arguments:
        pytest.skip("no tensor of this operator")
    if fault == "on the CPU":
        arguments[name] = arguments[name].cpu()
    else:
        arguments[name].untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(torch.ops.dspnet_cpp, step.name)(**arguments, **rules.OPTIONS)


@pytest.mark.parametrize("case", ema_rules.REFUSED)
def test_ema_update_rejects_invalid_arguments(case):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ema_update(*ema_rules.REFUSED[case](torch.randn(4, 6, **FP32), torch.randn(4, 6, **FP32)))


@pytest.mark.parametrize("case", mse_rules.REFUSED)
def test_normalized_mse_rejects_invalid_arguments(case):
    with pytest.raises(RuntimeError, match="normalized_mse"):
        normalized_mse(*on_gpu(mse_rules.REFUSED[case]))


def test_normalized_mse_of_two_dtypes_falls_back_to_native(policy):
    p, z = torch.randn(9, 77, **FP32), torch.randn(9, 77, **FP32).half()
    with pytest.raises(RuntimeError, match="one dtype"):
        torch.ops.dspnet_cpp.normalized_mse(p, z)
    policy("auto")
    mse_rules.check(p, z)


def test_tensors_on_two_devices_are_rejected():
    x = torch.randn(4, 6, **FP32)
    for call in (
        lambda: torch.ops.dspnet_cpp.ema_update([x], [x.cpu()], 0.5),
        lambda: torch.ops.dspnet_cpp.normalized_mse(x, x.cpu()),
        lambda: torch.ops.dspnet_cpp.normalized_mse_backward(torch.tensor(1.0), x, x, True, True),
    ):
        with pytest.raises(RuntimeError):
            call()
