"""Python functions with the operators' signatures that run the kernels of csrc/cuda on the CPU (emulator/emulator.h).

A misaligned vector load ends the process, so tests call these functions in a subprocess.
"""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import nvidia
import torch
import triton
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
EMULATOR = Path(__file__).parent / "emulator"
# CUDA's headers for 16-bit types, which any C++ compiler accepts. Triton contains all but one.
HEADERS = [
    Path(triton.__file__).parent / "backends/nvidia/include",
    *(Path(root, "cuda_cccl/include") for root in nvidia.__path__),
]
KERNELS = ("adamw_ema_step", "ema_update", "lars_ema_step", "normalized_mse")
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
GUARD = 64  # bytes after a workspace

library: ctypes.CDLL


def build(compiler: str, folder: Path) -> None:
    """Compile the kernels to a library in a folder for `load`, with the sanitizers in DSPNET_SANITIZE."""
    kernels = [ROOT / f"csrc/cuda/{name}.cu" for name in KERNELS]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    sanitizers = os.environ.get("DSPNET_SANITIZE")
    if sanitizers:
        command += ["-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    else:
        command += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    command += ["-include", EMULATOR / "emulator.h", "-I", EMULATOR, "-I", ROOT / "csrc/include"]
    command += [option for headers in HEADERS for option in ("-isystem", headers)]
    command += ["-o", folder / "emulated.so", "-x", "c++", *kernels, EMULATOR / "launchers.cpp"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's runtime
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def load(folder: Path | str) -> None:
    global library
    library = ctypes.CDLL(str(Path(folder, "emulated.so")))
    for name in ("adamw_ema_step", "lars_ema_step", "normalized_mse"):
        getattr(library, f"emulated_{name}_workspace").restype = ctypes.c_int64


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _flat(*buffers: Tensor) -> list:
    """Addresses of buffers, the last of which are the targets, and the numbers of parameters and targets."""
    return [*map(_address, buffers), _long(len(buffers[0])), _long(len(buffers[-1]))]


def _segments(starts: Sequence[int], sizes: Sequence[int]) -> list:
    return [*((ctypes.c_int64 * len(numbers))(*numbers) for numbers in (starts, sizes)), _long(len(starts))]


def _scalars(*scalars: Tensor) -> list:
    """Address and dtype of each scalar."""
    return [part for scalar in scalars for part in (_address(scalar), DTYPES[scalar.dtype])]


class _Workspace:
    """A workspace filled with NaN, and a guard after it that must not be written."""

    def __init__(self, operator: str, size: int):
        self.bytes = getattr(library, f"emulated_{operator}_workspace")(_long(size))
        self.memory = torch.full(((self.bytes + GUARD) // 8 + 1,), float("nan"), dtype=torch.float64)

    def __enter__(self) -> ctypes.c_void_p:
        return _address(self.memory)

    def __exit__(self, *_) -> None:
        assert self.memory[-(-self.bytes // 8) :].isnan().all(), "an operator wrote past the end of its workspace"


def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], tau: float) -> None:
    """Update dense tensors of one dtype with the same strides."""
    count = len(targets)
    library.emulated_ema_update(
        DTYPES[targets[0].dtype],
        _long(count),
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in targets)),
        (ctypes.c_void_p * count)(*(t.data_ptr() for t in onlines)),
        (ctypes.c_int64 * count)(*(t.numel() for t in targets)),
        ctypes.c_double(tau),
    )


def lars_ema_step(
    params, grads, momenta, targets, starts, sizes, lr, tau, weight_decay, momentum, eta, apply=None
) -> None:
    with _Workspace("lars_ema_step", len(params)) as workspace:
        library.emulated_lars_ema_step(
            DTYPES[params.dtype],
            *_flat(params, grads, momenta, targets),
            *_segments(starts, sizes),
            *_scalars(lr, tau),
            *(ctypes.c_double(value) for value in (weight_decay, momentum, eta)),
            _address(apply),
            workspace,
        )


def adamw_ema_step(
    params,
    grads,
    momenta,
    variances,
    targets,
    steps,
    starts,
    sizes,
    lr,
    weight_decay,
    tau,
    beta1,
    beta2,
    eps,
    apply=None,
) -> None:
    with _Workspace("adamw_ema_step", len(params)) as workspace:
        library.emulated_adamw_ema_step(
            DTYPES[params.dtype],
            *_flat(params, grads, momenta, variances, targets),
            *_segments(starts, sizes),
            *_scalars(lr, weight_decay, tau),
            *(ctypes.c_double(value) for value in (beta1, beta2, eps)),
            _address(apply),
            *_scalars(steps),
            workspace,
        )


def normalized_mse(p: Tensor, z: Tensor) -> Tensor:
    loss = p.new_full((), float("nan"), dtype=torch.promote_types(p.dtype, torch.float32))
    with _Workspace("normalized_mse", len(p)) as workspace:
        shape = _long(p.shape[0]), _long(p.shape[1])
        library.emulated_normalized_mse(DTYPES[p.dtype], _address(p), _address(z), *shape, _address(loss), workspace)
    return loss


def normalized_mse_backward(grad: Tensor, p: Tensor, z: Tensor, p_gradient: bool, z_gradient: bool):
    grad_p, grad_z = (
        torch.full_like(v, float("nan")) if needed else None for v, needed in ((p, p_gradient), (z, z_gradient))
    )
    shape = _long(p.shape[0]), _long(p.shape[1])
    library.emulated_normalized_mse_backward(
        DTYPES[p.dtype], _address(p), _address(z), *shape, _address(grad), _address(grad_p), _address(grad_z)
    )
    return grad_p, grad_z
