"""Which builds of the compiled library a process may use, with the answers of other CPUs in place of this one's."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dspnet_fast import capability
from dspnet_fast.ops import cpp

ROOT = Path(__file__).parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
# CPUs by the instructions of capability.INSTRUCTIONS that they have. Xeon Phi has a part of AVX-512.
CPUS = {
    "AVX512": ["avx2", "fma3", "avx512_f", "avx512_dq", "avx512_vl", "avx512_bw"],
    "Xeon Phi": ["avx2", "fma3", "avx512_f"],
    "AVX2": ["avx2", "fma3"],
    "AVX": [],
}
HIGHEST = {"AVX512": "AVX512", "Xeon Phi": "AVX2", "AVX2": "AVX2", "AVX": "DEFAULT"}


@pytest.fixture
def machine(monkeypatch):
    """Sets the CPU, and torch's capability: by default what torch selects for that CPU."""

    def set_machine(cpu: str, torch_capability: str | None = None) -> None:
        flags = dict.fromkeys(CPUS["AVX512"], False) | dict.fromkeys(CPUS[cpu], True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_capability or HIGHEST[cpu])

    return set_machine


@pytest.mark.parametrize("cpu", CPUS)
def test_highest_capability_is_one_that_the_cpu_executes(machine, cpu):
    machine(cpu)
    assert capability.highest() == HIGHEST[cpu]
    assert [name for name in capability.ORDER if capability.executes(name)][-1] == HIGHEST[cpu]
    machine(cpu, "AVX512")
    assert capability.highest() == HIGHEST[cpu]
    machine(cpu, "DEFAULT")
    assert capability.highest() == "DEFAULT"


def test_capability_of_another_architecture_is_default(machine):
    machine("AVX", "SVE256")
    assert capability.highest() == "DEFAULT" and capability.problem("it", ["DEFAULT"]) == ""


@pytest.mark.parametrize(
    ("cpu", "torch_capability", "built", "reason"),
    [
        ("AVX512", None, ["AVX512"], ""),
        ("AVX512", None, ["AVX2"], ""),
        ("AVX2", None, capability.ORDER, ""),
        ("AVX", None, capability.ORDER, ""),
        ("AVX512", "AVX2", capability.ORDER, ""),
        ("AVX2", "AVX512", capability.ORDER, "ATEN_CPU_CAPABILITY asks for AVX512, which this CPU cannot execute"),
        ("Xeon Phi", "AVX512", ["DEFAULT"], "ATEN_CPU_CAPABILITY asks for AVX512, which this CPU cannot execute"),
        ("AVX", "AVX2", capability.ORDER, "ATEN_CPU_CAPABILITY asks for AVX2, which this CPU cannot execute"),
        ("AVX2", None, ["AVX512"], "the library was built for AVX512 alone, which this CPU cannot execute"),
        ("AVX", None, ["AVX2"], "the library was built for AVX2 alone, which this CPU cannot execute"),
        ("AVX512", "AVX2", ["AVX512"], "the library was built for AVX512 alone, but torch's capability is AVX2"),
        ("AVX2", "DEFAULT", ["AVX2"], "the library was built for AVX2 alone, but torch's capability is DEFAULT"),
    ],
)
def test_library_without_usable_build_is_not_loaded(
    machine, monkeypatch, tmp_path, cpu, torch_capability, built, reason
):
    machine(cpu, torch_capability)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    library = tmp_path / "_C.so"
    library.with_suffix(".json").write_text(json.dumps({"torch": torch.__version__, "capabilities": built}))
    answer, why = cpp.load_into(library, "the library")
    assert answer == (not reason) == bool(loaded) and why.startswith(reason)


WITHOUT_AVX512 = """
import torch
flags = {**torch.cpu.get_capabilities(), "avx2": True, "fma3": True, "avx512_f": False}
torch.cpu.get_capabilities = lambda: flags
from dspnet_fast import info
info.main(["--json"])
"""


@pytest.mark.skipif(not (X86 and cpp.load()[0]), reason=cpp.load()[1] or "this architecture has one capability")
def test_info_shows_why_a_capability_that_the_cpu_lacks_is_refused(run_python):
    facts = json.loads(run_python("-c", WITHOUT_AVX512, ATEN_CPU_CAPABILITY="avx512", DSPNET_KERNELS="cpp"))
    reason = "ATEN_CPU_CAPABILITY asks for AVX512, which this CPU cannot execute: unset it"
    assert facts["machine"]["cpu operators"] == reason and reason in facts["error"]
    assert not any(providers["cpp"]["available"] for providers in facts["ops"].values())


# csrc/include/capability.h with a torch and a CPU that say what the command line says.
CHOICE = r"""
#include <cstdio>
#include <string>
#include <string_view>
static const char* torch_capability;
static const char* instructions;
namespace at { std::string get_cpu_capability() { return torch_capability; } }
#define __builtin_cpu_supports(name) (std::string_view(instructions).find(" " name " ") != std::string_view::npos)
#include "capability.h"
int main(int, char** arguments) {
  torch_capability = arguments[1];
  instructions = arguments[2];
  std::printf("%d", static_cast<int>(dspnet::build_capability()));
}
"""


@pytest.fixture(scope="module", params=["", *capability.ORDER])
def library(request, tmp_path_factory):
    """The builds in a library, and a function of a CPU and torch's capability: the build that the library registers."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not X86:
        pytest.skip("no C++ compiler, or none of these CPUs")
    folder = tmp_path_factory.mktemp("choice")
    (folder / "ATen").mkdir()
    (folder / "ATen/Version.h").touch()
    (folder / "choice.cpp").write_text(CHOICE)
    defined = [f"-DDSPNET_CAPABILITY={request.param}"] if request.param else []
    includes = ["-I", folder, "-I", ROOT / "csrc/include"]
    program = folder / "choice"
    subprocess.run([compiler, "-std=c++20", *defined, *includes, folder / "choice.cpp", "-o", program], check=True)

    def registered(cpu: str, torch_capability: str) -> str:
        names = {"fma3": "fma"} | {name: name.replace("_", "") for name in CPUS["AVX512"] if name != "fma3"}
        instructions = f" {' '.join(names[name] for name in CPUS[cpu])} "
        done = subprocess.run([program, torch_capability, instructions], check=True, capture_output=True, text=True)
        return ["", *capability.ORDER][int(done.stdout)]

    return [request.param] if request.param else capability.ORDER, registered


@pytest.mark.parametrize("torch_capability", capability.ORDER)
@pytest.mark.parametrize("cpu", CPUS)
def test_library_registers_the_highest_build_that_the_cpu_executes(machine, library, cpu, torch_capability):
    built, registered = library
    machine(cpu, torch_capability)
    usable = [name for name in built if capability.ORDER.index(name) <= capability.ORDER.index(capability.highest())]
    assert registered(cpu, torch_capability) == (usable[-1] if usable else "")
