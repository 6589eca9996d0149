"""Contents of a wheel, with and without a compiler, and the reasons for missing libraries."""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

import dspnet_fast
from dspnet_fast import capability
from dspnet_fast.ops import cpp

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository: a build must neither use nor leave other files in the original."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "dspnet_fast", "kernels", "train", "recipes"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_C*.*"))
    return copy


def pip_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["-m", "pip", "wheel", "-v", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-w"]
    return subprocess.run(
        [sys.executable, *command, out, source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def contents(out: Path) -> zipfile.ZipFile:
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_wheel_contains_all_packages_recipes_and_commands(source, tmp_path):
    done = pip_wheel(source, tmp_path, DSPNET_BUILD="0")
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = contents(tmp_path)
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"dspnet_fast", f"dspnet_fast-{dspnet_fast.__version__}.dist-info"}
    expected = {
        (prefix / file.relative_to(ROOT / folder)).as_posix()
        for folder, prefix in (
            ("dspnet_fast", Path("dspnet_fast")),
            ("kernels", Path("dspnet_fast/kernels")),
            ("train", Path("dspnet_fast/train")),
            ("recipes", Path("dspnet_fast/recipes")),
        )
        for kind in ("*.py", "*.yaml")
        for file in (ROOT / folder).rglob(kind)
    }
    assert "dspnet_fast/kernels/ema_update.py" in expected and "dspnet_fast/train/__init__.py" in expected
    assert expected <= names
    assert not any(name.endswith(".so") for name in names)
    assert "DSPNET_BUILD=0" in json.loads(wheel.read("dspnet_fast/_C.json"))["reason"]
    assert json.loads(wheel.read("dspnet_fast/_C_cuda.json"))["reason"]
    scripts = wheel.read(f"dspnet_fast-{dspnet_fast.__version__}.dist-info/entry_points.txt").decode()
    entries = re.findall(r'"(dspnet-\w+ = [\w.]+:main)"', (ROOT / "setup.py").read_text())
    assert len(entries) == 12 and all(entry in scripts for entry in entries)


def test_failed_compilation_is_reported_and_fatal_only_on_demand(source, tmp_path):
    broken = {"CXX": "false"}
    done = pip_wheel(source, tmp_path, DSPNET_BUILD="auto", **broken)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (s for s in (done.stdout + done.stderr).splitlines() if "dspnet-fast: the compiled CPU operators" in s)
    assert "everything works without them, only slower" in line
    reason = json.loads(contents(tmp_path).read("dspnet_fast/_C.json"))["reason"]
    assert reason in line

    demanded = pip_wheel(source, tmp_path / "none", DSPNET_BUILD="1", **broken)
    assert demanded.returncode != 0 and reason in demanded.stdout + demanded.stderr


def test_cuda_on_demand_without_compiler_is_an_error(source, tmp_path):
    done = pip_wheel(source, tmp_path, DSPNET_BUILD="0", DSPNET_CUDA="1")
    assert done.returncode != 0 and "the CUDA operators were not built" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variable", "choices"),
    [("DSPNET_BUILD", "0, 1 or auto"), ("DSPNET_CUDA", "0, 1 or auto"), ("DSPNET_CAPABILITY", "AVX2 or AVX512")],
)
def test_unknown_build_mode_is_rejected(source, tmp_path, variable, choices):
    done = pip_wheel(source, tmp_path, **{variable: "yes"})
    assert done.returncode != 0
    assert re.search(f"{variable}='yes': must be .*{choices}", done.stdout + done.stderr)


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.mark.parametrize(
    ("inplace", "variable", "built"),
    [(True, None, "native"), (False, None, "all"), (True, "all", "all"), (False, "AVX2", "AVX2")],
)
def test_in_place_build_is_for_this_cpu_and_a_wheel_for_all(setup, monkeypatch, tmp_path, inplace, variable, built):
    monkeypatch.chdir(tmp_path)
    for name in ("DSPNET_BUILD", "DSPNET_CUDA", "DSPNET_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv("DSPNET_CAPABILITY", variable)
    given = []
    functions = setup["BuildNative"].run.__globals__
    for name in ("missing_tool", "missing_cuda"):
        monkeypatch.setitem(functions, name, lambda: "")
    monkeypatch.setitem(functions, "compile_into", lambda _, library, *definitions: given.append(definitions[0]) or "")
    command = setup["BuildNative"](Distribution())
    command.inplace, command.build_lib = inplace, str(tmp_path)
    command.run()
    assert given == [f"-DDSPNET_CAPABILITY={built}"] * 2  # of both libraries: either writes _C.json


@pytest.mark.parametrize("asked", ["native", "all", "AVX2"])
def test_note_beside_the_library_names_its_builds(setup, tmp_path, asked):
    if setup["missing_tool"]() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(setup["missing_tool"]() or "this architecture has one capability")
    definitions = [f"-DDSPNET_PYTHON={sys.executable}", f"-DDSPNET_OUTPUT={tmp_path}", f"-DDSPNET_CAPABILITY={asked}"]
    cmake = setup["find_tool"]("cmake")
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path / "build", *definitions], check=True, capture_output=True)
    built = {"native": [capability.highest()], "all": capability.ORDER}.get(asked, [asked])
    assert json.loads((tmp_path / "_C.json").read_text()) == {"torch": torch.__version__, "capabilities": built}


def test_library_is_built_where_a_compiler_exists():
    if not (shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++"))):
        pytest.skip("no compiler or no cmake")
    assert cpp.load() == (True, "")
    if os.environ.get("DSPNET_CAPABILITY") == "all" and platform.machine() in ("x86_64", "AMD64"):
        assert cpp.builds() == capability.ORDER


@pytest.mark.parametrize(
    "note, message",
    [
        (None, "is missing"),
        ("{", "is missing"),
        ('{"reason": "no C++ compiler was found"}', "was not built: no C++ compiler was found"),
        ('{"torch": "1.0"}', f"was built for torch 1.0, not {torch.__version__}"),
        (f'{{"torch": "{torch.__version__}"}}', "cannot be loaded"),
    ],
)
def test_reason_for_a_missing_library(tmp_path, note, message):
    if note is not None:
        (tmp_path / "_C.json").write_text(note)
    (tmp_path / "_C.so").write_text("not a library")
    loaded, reason = cpp.load_into(tmp_path / "_C.so", "the compiled library")
    assert not loaded and message in reason
