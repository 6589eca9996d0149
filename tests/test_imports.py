"""Modules import in one direction (docs/architecture.md): no cycles, and the library imports no commands."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "dspnet_fast.ops", "dspnet_fast.nn", "dspnet_fast.models", "train")  # each imports those before it


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_of(path): path for part in ("kernels", "dspnet_fast", "train") for path in (ROOT / part).rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The modules of the project that a module names in any import, in functions too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            of_names = {f"{base}.{alias.name}" for alias in node.names}
            named |= of_names if of_names <= MODULES.keys() else {base, *of_names}
    return named & MODULES.keys() - {module}


IMPORTS = {module: imported(module) for module in MODULES}


def part_of(module: str) -> int | None:
    return next((at for at, part in enumerate(ORDER) if module == part or module.startswith(f"{part}.")), None)


def test_all_packages_are_found():
    assert {part_of(module) for module in MODULES} == {*range(len(ORDER)), None}
    assert IMPORTS["train.pretraining.trainer"] >= {
        "train.pretraining.flat_buffers",
        "train.pretraining.dspnet",
        "dspnet_fast.subnets",
    }


def test_imports_have_no_cycles():
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(MODULES)


@pytest.mark.parametrize("at", range(len(ORDER)), ids=ORDER)
def test_package_imports_only_earlier_packages(at):
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if part_of(module) == at and (part_of(other) or 0) > at
    ]
    assert not upwards


def test_library_imports_no_command():
    found = [module for module, others in IMPORTS.items() for other in others if other.split(".")[0] == "train"]
    assert all(module.split(".")[0] == "train" for module in found)
