"""CPU capabilities: the instruction sets that csrc/cpu is compiled for, and those that this process may use.

A process may use a capability that is at most torch's and that the CPU can execute. torch's alone is not enough: it is
ATEN_CPU_CAPABILITY, unchecked. Run as a program, this file prints the highest, for CMakeLists.txt.
"""

from collections.abc import Iterable

import torch

# The instructions that each capability requires, in ascending order. Every CPU with AVX2 also has F16C. DEFAULT is the
# only one on aarch64, where it includes NEON, which all of these CPUs have.
INSTRUCTIONS = {
    "DEFAULT": (),
    "AVX2": ("avx2", "fma3"),
    "AVX512": ("avx2", "fma3", "avx512_f", "avx512_dq", "avx512_vl", "avx512_bw"),
}
ORDER = list(INSTRUCTIONS)


def executes(capability: str) -> bool:
    """Whether the CPU has the instructions of a capability. Environment variables have no influence."""
    flags = torch.cpu.get_capabilities()
    return all(flags.get(instruction) for instruction in INSTRUCTIONS[capability])


def allowed() -> str:
    """torch's capability: ATEN_CPU_CAPABILITY, or the CPU's highest. DEFAULT on other architectures than x86-64."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in ORDER else "DEFAULT"


def highest() -> str:
    """The highest capability that this process may use."""
    return next(name for name in reversed(ORDER) if ORDER.index(name) <= ORDER.index(allowed()) and executes(name))


def problem(library: str, built: Iterable[str]) -> str:
    """The reason why this process may use none of a library's builds, or an empty string.

    Args:
        library: name of the library in the reason.
        built: capabilities of its builds: all, or one.
    """
    if not executes(allowed()):
        return f"ATEN_CPU_CAPABILITY asks for {allowed()}, which this CPU cannot execute: unset it"
    if any(ORDER.index(name) <= ORDER.index(highest()) for name in built):
        return ""
    (only,) = built
    if not executes(only):
        return f"{library} was built for {only} alone, which this CPU cannot execute: install the project again"
    return (
        f"{library} was built for {only} alone, but torch's capability is {allowed()}: unset ATEN_CPU_CAPABILITY, "
        "or install the project with DSPNET_CAPABILITY=all"
    )


if __name__ == "__main__":
    print(highest())
