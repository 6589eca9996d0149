"""Checks of a GPU before training, without one: torch.cuda is replaced."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspnet_fast.errors import InputError
from dspnet_fast.ops import triton
from train.config import PretrainConfig
from train.costs.flops import largest_activation
from train.distributed import process_group
from train.pretraining import run
from train.pretraining.trainer import Trainer
from train.run.device import check_activations, check_fast_kernels, check_precision, choose_device, configure_cuda

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, shared memory): replace the GPU's properties."""

    def replace(capability, shared=99 << 10):
        properties = SimpleNamespace(shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "this GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

    return replace


def _set_torchrun(monkeypatch, rank):
    """The variables of one of two processes that torchrun starts."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, **address}.items():
        monkeypatch.setenv(name, str(value))


def test_bf16_is_refused_before_compute_capability_8(gpu):
    gpu((7, 0))
    with pytest.raises(InputError, match=r"this GPU has compute capability 7\.0.*use --precision fp16"):
        check_precision("bf16", GPU)
    check_precision("fp16", GPU)
    check_precision("bf16", torch.device("cpu"))
    gpu((8, 0))
    check_precision("bf16", GPU)


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ((8, 6), 99 << 10, ""),
        ((9, 0), 227 << 10, ""),
        ((7, 5), 64 << 10, "this GPU is older than compute capability 8.0, which Triton needs"),
        ((8, 9), 64 << 10, "this GPU has 64 KB of shared memory per block, and the kernels use up to 99 KB"),
    ],
)
@pytest.mark.skipif(triton.INTERPRETED, reason="interpreted kernels need no GPU")
def test_triton_needs_shared_memory_of_the_device(gpu, capability, shared, reason):
    gpu(capability, shared)
    assert triton.supported.__wrapped__() == (not reason, reason)


def test_activations_of_2_to_the_31_elements_name_enough_micro_batches():
    per_image = largest_activation(PretrainConfig(image_size=224))
    assert per_image == 64 * 112 * 112  # the first expansion
    check_activations(per_image, 2 * 1337)
    with pytest.raises(InputError, match=r"2676 images has 2\.1e\+09 elements.*--grad-accum-steps 2, or more GPUs"):
        check_activations(per_image, 2 * 1338)
    with pytest.raises(InputError, match="--grad-accum-steps 4"):
        check_activations(per_image, 8192, micro_batches=2)
    check_activations(per_image, 8192, micro_batches=4)


def test_convolution_algorithms_are_deterministic_unless_asked_otherwise(monkeypatch):
    cudnn = torch.backends.cudnn
    for name in ("deterministic", "benchmark", "allow_tf32"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # restored afterwards
    assert PretrainConfig().cudnn == "deterministic"
    for mode, expected in {
        "deterministic": (True, False),
        "default": (False, False),
        "benchmark": (False, True),
    }.items():
        configure_cuda(False, mode)
        assert (cudnn.deterministic, cudnn.benchmark) == expected
    with pytest.raises(InputError, match="--cudnn must be one of"):
        PretrainConfig(cudnn="fastest")


def test_rank_chooses_its_gpu_before_anything_asks_the_driver(gpu, monkeypatch, tmp_path):
    """Otherwise every rank would create a CUDA context on GPU 0."""
    calls = []

    def record(module, name, value=None):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append((name, *args)) or value)

    gpu((9, 0))
    for name, value in {"set_device": None, "current_device": 1, "get_device_capability": (9, 0)}.items():
        record(torch.cuda, name, value)
    for name in ("get_device_name", "get_device_properties", "init", "_lazy_init", "mem_get_info", "synchronize"):
        record(torch.cuda, name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(process_group, "rendezvous", lambda timeout: (None, "launch"))
    record(torch.distributed, "init_process_group")
    _set_torchrun(monkeypatch, rank=1)

    def stop(config):
        raise InterruptedError

    monkeypatch.setattr(run, "open_train_images", stop)
    with pytest.raises(InterruptedError):
        run.PretrainRun(PretrainConfig(out=str(tmp_path / "run"), fast_kernels=True), resume=False)
    assert calls[0] == ("set_device", 1)
    assert [name for name, *_ in calls[1:]] == ["init_process_group"]


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [1]), ("gloo", None)])
def test_barrier_uses_the_gpu_of_the_rank(backend, devices, monkeypatch):
    given = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: given.append(device_ids))
    process_group.World(rank=3, size=4, local_rank=1).barrier()
    assert given == [devices]


def test_kernels_are_compiled_before_the_watchdog_starts(small, monkeypatch):
    calls = []
    monkeypatch.setattr(
        run, "compile_kernels", lambda config, device, *rest: calls.append((config.network, device.type))
    )

    def stop(watchdog):
        raise InterruptedError

    monkeypatch.setattr(run.Watchdog, "__enter__", stop)
    with pytest.raises(InterruptedError):
        run.PretrainRun(small(), resume=False).run()
    assert calls == [("resnet", "cpu")]


def test_unknown_and_absent_devices_are_named(monkeypatch):
    with pytest.raises(InputError, match="--device must be one of auto, cpu, cuda, mps, not 'gpu'"):
        choose_device("gpu")
    with pytest.raises(InputError, match="--device mps, but Apple's GPU backend is not in this build of PyTorch"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(InputError, match="needs macOS 14 or later: use --device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")


def test_mps_takes_fp32_without_fast_kernels_in_one_process(monkeypatch):
    apple = torch.device("mps")
    check_precision("fp32", apple)
    for precision in ("bf16", "fp16"):
        with pytest.raises(InputError, match=f"--precision {precision} was not tested on Apple's GPUs: use .*fp32"):
            check_precision(precision, apple)
    with pytest.raises(InputError, match="--fast-kernels: no operator has a kernel for mps"):
        check_fast_kernels(apple)
    _set_torchrun(monkeypatch, rank=0)
    with pytest.raises(InputError, match="2 processes with --device mps: .* use one process"):
        process_group.init_process_group(apple)


class WithoutFloat64(TorchDispatchMode):
    """Fails like MPS where a tensor on the meta device would be in float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("network", [{}, {"network": "mobilenet_v3_large", "dns": "w0.50,w1.00", "image_size": 32}])
def test_step_needs_no_float64_and_no_value_on_the_host(small, network):
    """The meta device has no values, so reading one would raise."""
    with WithoutFloat64():
        trainer = Trainer(small(**network), 10, torch.device("meta"))
        size = trainer.config.image_size
        losses = trainer.train_step(torch.empty(16, 3, size, size, dtype=torch.uint8, device="meta"))
    assert trainer.step == 1 and {loss.dtype for loss in losses.values()} == {torch.float32}
