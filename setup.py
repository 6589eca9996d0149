"""Package metadata, and a thin driver of cmake (CMakeLists.txt is the one definition of the native build).

The compiled library only adds speed. Where it cannot be built, the install succeeds without it, says so in one line,
and leaves the reason in dspnet_fast/_C.json for `python -m dspnet_fast.info`. DSPNET_BUILD=1 makes a failed build an
error, DSPNET_BUILD=0 skips it, DSPNET_BUILD=auto is the default.
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


def packages() -> dict[str, str]:
    """Every folder that holds Python files or recipes, as {dotted name: folder}."""
    found = {}
    for name, root in ROOTS.items():
        for folder in (Path(root), *sorted(Path(root).rglob("*/"))):
            if any(folder.glob("*.py")) or any(folder.glob("*.yaml")):
                found[".".join((name, *folder.relative_to(root).parts))] = folder.as_posix()
    return found


class BuildNative(build_ext):
    """Builds dspnet_fast/_C.so with cmake, in place for an editable install."""

    def run(self) -> None:
        mode = os.environ.get("DSPNET_BUILD", "auto")
        if mode not in ("0", "1", "auto"):
            raise SystemExit(f"DSPNET_BUILD={mode!r}: must be 0, 1 or auto")
        package = Path("dspnet_fast" if self.inplace else f"{self.build_lib}/dspnet_fast").absolute()
        package.mkdir(parents=True, exist_ok=True)
        reason = "switched off by DSPNET_BUILD=0" if mode == "0" else missing_tool() or compile_into(package)
        if not reason:
            return
        (package / "_C.so").unlink(missing_ok=True)
        (package / "_C.json").write_text(json.dumps({"reason": reason}) + "\n")
        message = f"dspnet-fast: the compiled CPU operators were not built ({reason})"
        if mode == "1":
            raise SystemExit(message)
        print(f"{message}; everything works without them, only slower", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "dspnet_fast").glob("_C.*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


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


def compile_into(package: Path) -> str:
    """Runs cmake; returns why it failed, or an empty string. The build folder is kept, so a repeat is quick."""
    cmake, ninja = str(find_tool("cmake")), find_tool("ninja")
    # cmake refuses to change the generator of a folder that it has configured.
    generator = "ninja" if ninja else "make"
    build = Path("build", f"native-{sys.implementation.cache_tag}-{generator}").absolute()
    configure = [
        cmake,
        "-S",
        ".",
        "-B",
        str(build),
        f"-DDSPNET_PYTHON={sys.executable}",
        f"-DDSPNET_OUTPUT={package}",
    ]
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            # A compiler's first error, else cmake's, whose text is on the lines after it.
            error = re.search(r"^.*\berror: .*$|(?<=^CMake Error)[^\n]*(?:\n+ +[^\n]+){1,3}", done.stdout, re.MULTILINE)
            return f"cmake failed: {' '.join(error[0].split()) if error else 'it gave no error message'}"
    return ""


PACKAGES = packages()
EXTRAS = {
    "timm": ["timm"],
    "dali": ["nvidia-dali-cuda130"],  # with CUDA 12: nvidia-dali-cuda120
    "test": [
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "scikit-learn",
        "timm",
        "nvidia-dali-cuda130; sys_platform == 'linux'",
    ],
    "lint": ["ruff", "mypy"],
}

setup(
    name="dspnet-fast",
    version="0.1.0",
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
            "dspnet-pretrain = dspnet_fast.train.pretrain:main",
            "dspnet-evaluate = dspnet_fast.train.evaluate:main",
            "dspnet-export = dspnet_fast.train.export:main",
        ]
    },
    # A name only: it makes the wheel a platform wheel and runs build_ext.
    ext_modules=[Extension("dspnet_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
