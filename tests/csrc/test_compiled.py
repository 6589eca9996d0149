"""Checks of the compiled CUDA library without a GPU: its presence, kernel resources, and loading without a driver."""

import ctypes
import importlib.util
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from dspnet_fast.ops import cuda

ROOT = Path(__file__).parent.parent.parent
# Kernels in each file. adamw_ema_step: 2 dtypes x 2 widths, and the factors; ema_update: 4 dtypes; lars_ema_step: 2
# dtypes x 2 widths x 2 passes, and the trust ratios; normalized_mse: 4 dtypes x 2 widths x 2 directions, and 2 means;
# device: a probe.
KERNELS = {"adamw_ema_step": 5, "device": 1, "ema_update": 4, "lars_ema_step": 9, "normalized_mse": 18}

needs_library = pytest.mark.skipif(not cuda.load()[0], reason=cuda.load()[1])


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_library_exists_wherever_nvcc_could_compile_it(setup):
    if os.environ.get("DSPNET_CUDA") == "0" or os.environ.get("DSPNET_CUDA_ARCHITECTURES"):
        pytest.skip("DSPNET_CUDA=0 or DSPNET_CUDA_ARCHITECTURES is set")
    if reason := setup["missing_cuda"]():
        pytest.skip(reason)
    assert cuda.load() == (True, "")
    assert {"sm_80", "sm_90"} <= set(cuda.built().split())


def fake_nvcc(folder: Path, release: str) -> str:
    """Write a script that prints the version of this release of nvcc. Returns its path."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_missing_cuda_gives_the_reason(setup, tmp_path, monkeypatch):
    major = int(torch.version.cuda.split(".")[0])
    monkeypatch.setenv("CUDACXX", fake_nvcc(tmp_path, f"{major}.7"))
    assert setup["missing_cuda"]() == ""
    monkeypatch.setenv("CUDACXX", fake_nvcc(tmp_path, f"{major - 1}.4"))
    assert f"is of CUDA {major - 1}.4, but torch was built with CUDA {torch.version.cuda}" in setup["missing_cuda"]()
    fake_nvcc(tmp_path, "unknown")
    assert "does not say its version" in setup["missing_cuda"]()
    monkeypatch.setattr(setup["missing_cuda"].__globals__["shutil"], "which", lambda *_, **__: None)
    assert "nvcc was not found" in setup["missing_cuda"]()


CALLS_WITHOUT_A_DRIVER = """
import torch
from dspnet_fast.ops import cuda
assert cuda.load() == (True, "")
problem = torch.ops.dspnet_cpp.cuda_problem(0)
assert "driver" in problem or "device" in problem, problem
# Without a tensor on a GPU, only redispatch selects the CUDA key.
on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, one = torch.randn(3, 4), torch.tensor(1.0)
flat = [torch.randn(9) for _ in range(5)]
for name, arguments in {
    "adamw_ema_step": (*flat, one.clone(), [0], [9], one, one, one, 0.9, 0.999, 1e-8),
    "ema_update": ([x], [x.clone()], 0.5),
    "lars_ema_step": (*flat[:4], [0], [9], one, one, 0.0, 0.9, 0.001),
    "normalized_mse": (x, x),
    "normalized_mse_backward": (one, x, x, True, True),
}.items():
    try:
        getattr(torch.ops.dspnet_cpp, name).default.redispatch(on_cuda, *arguments)
    except RuntimeError as error:
        assert f"{name}: " in str(error) and "of type cuda" in str(error).lower(), error
    else:
        raise AssertionError(name)
print("raised")
"""


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver and a device")
def test_library_loads_without_a_driver_and_reports_it(run_python):
    assert run_python("-c", CALLS_WITHOUT_A_DRIVER).strip() == "raised"
    assert cuda.supported() == (False, "no CUDA device")


def tool(name: str) -> Path:
    """The path of one of NVIDIA's tools that Triton contains."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("Triton, which contains the tools, is not installed")
    return Path(spec.origin).parent / "backends/nvidia/bin" / name


@needs_library
def test_no_kernel_spills_registers():
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cuda.LIBRARY], capture_output=True, text=True)
    usages = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout)
    architectures = len(cuda.built().split()) - 2
    assert len(usages) == architectures * sum(KERNELS.values()), usage.stdout + usage.stderr
    for kernel, registers, stack, local in usages:
        assert int(stack) == int(local) == 0, f"{kernel} spills"
        assert int(registers) <= 80, f"{kernel} uses {registers} registers: fewer than 3 blocks of 256 threads fit"


@needs_library
def test_loads_and_stores_are_16_bytes_wide():
    sass = subprocess.run([tool("cuobjdump"), "-sass", "-arch", "sm_80", cuda.LIBRARY], capture_output=True, text=True)
    kernels = {part.split("\n", 1)[0].strip(): part for part in sass.stdout.split("Function : ")[1:]}
    streaming = {name: code for name, code in kernels.items() if re.search("ema_update_kernel|squares|update_k", name)}
    streaming |= {name: code for name, code in kernels.items() if re.search("(for|back)ward_kernel", name)}
    vectorized = {name for name, code in streaming.items() if "LDG.E.128" in code}
    # ema_update has vectorized kernels only; the others have a vectorized and a scalar kernel each.
    assert len(streaming) == 4 + 12 + 16 and len(vectorized) == 4 + 6 + 8, sorted(vectorized)
    assert all("STG.E.128" in kernels[name] for name in vectorized if not re.search("squares|forward", name))


def nvidia_folder(part: str) -> Path | None:
    """The folder of one of NVIDIA's packages for CUDA 12, if it is installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root, part) for root in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


def test_kernel_counts_cover_every_source():
    assert {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_v100(name):
    """Compute capability 7.0 is not supported by CUDA 13, so NVRTC of CUDA 12.9 compiles the kernels."""
    runtime_compiler, headers = nvidia_folder("cuda_nvrtc"), nvidia_folder("cuda_runtime")
    if runtime_compiler is None or headers is None:
        pytest.skip("nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 are not installed: pip install -e '.[test]'")
    nvrtc = ctypes.CDLL(str(runtime_compiler / "lib/libnvrtc.so.12"))
    program = ctypes.c_void_p()
    text = (ROOT / f"csrc/cuda/{name}.cu").read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None) == 0
    options = [
        "--gpu-architecture=sm_70",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"-I{ROOT / 'csrc/include'}",
        f"-I{headers / 'include'}",
    ]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    compiled = set(re.findall(rb"[.]text[.]([\w$]+)", cubin.raw))
    assert len(compiled) == KERNELS[name], compiled
