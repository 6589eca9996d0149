"""Calls every operator with invalid and nearly valid arguments in guard-paged buffers; test_fuzz.py runs this.

A call may succeed or raise an exception. It must not end the process, read or write outside its arguments' memory, or
write to an argument that its schema does not mark as written. Each tensor lies between two inaccessible pages, and
tensors that are only read lie in read-only memory, so an invalid access ends this process. Each call is first written
to a file, as Python code, which reproduces the crash. Outputs must have the shapes and dtypes that the operator's body
returns on the meta device.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import mmap
import resource
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_arguments import FORMS, VAST_TENSORS, calls
from fuzz_tensors import LACKING, MOST, VAST, Made, Same
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from dspnet_fast.ops import cpp, cuda, registry

inf, nan = float("inf"), float("nan")  # names in recorded calls
MEMORY = 4 << 30  # bytes available to all calls together
SECONDS = 120  # per call
OUTCOMES = ("succeeded", "refused", "not made")
IN_PYTHON = ("native", "by cpp")  # targets called through Python


@dataclass
class Target:
    """Operator `name`, called in one way."""

    way: str  # cpp: the compiled one; native, by cpp: the public one by a policy; cuda: the CUDA kernel's checks
    name: str

    @functools.cached_property
    def operator(self) -> Any:
        library = torch.ops.dspnet if self.way in IN_PYTHON else torch.ops.dspnet_cpp
        return getattr(library, self.name).default

    def call(self, values: dict[str, Any]) -> Any:
        if self.way == "cuda":
            return self.operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *values.values())
        registry.set_policy("cpp" if self.way == "by cpp" else "native")
        return self.operator(*values.values())


def targets() -> list[Target]:
    """All registered operators that take arguments, in every way to call them."""
    compiled, _ = cpp.load()
    cuda.load()
    found = []
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        library, _, name = full.partition("::")
        if library == "dspnet" and name in registry.operators:
            found.append(Target("native", name))
            if compiled and "cpp" in registry.operators[name].providers:
                found.append(Target("by cpp", name))
        elif library == "dspnet_cpp" and getattr(torch.ops.dspnet_cpp, name).default._schema.arguments:
            found.append(Target("cpp", name))
            if torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA"):
                found.append(Target("cuda", name))
    return found


def call(way: str, name: str, values: dict[str, Any]) -> str:
    """Make a call and return its outcome. Raises AssertionError if it broke a rule."""
    target = Target(way, name)
    tensors = flattened(values.values(), Made)
    if way in IN_PYTHON and any(tensor.state in LACKING or VAST in tensor.shape for tensor in tensors):
        return "not made"  # torch's operators would read beyond the storage, or sum 2^41 numbers
    arguments = target.operator._schema.arguments
    # the backward writes to main_grad
    written = {argument.name for argument in arguments if argument.is_write or argument.name.endswith("main_grad")}
    torch.manual_seed(0)
    try:
        made = materialized(values, written)
    except (RuntimeError, IndexError):  # torch cannot make such a tensor
        return "not made"
    returned = body_returns(name, made)
    if isinstance(returned, tuple) and any(tensor.numel() > MOST for tensor in returned):
        return "not made"
    try:
        outputs = target.call(made)
    except Exception as error:
        assert not isinstance(error, SystemError) and (way != "cpp" or "INTERNAL ASSERT" not in str(error)), error
        return "refused"
    given = flattened(made.values())
    assert way != "cuda" or not given, "treated a CPU tensor as a GPU tensor"
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs if isinstance(outputs, tuple) else ()
    if isinstance(returned, tuple):
        got, want = ([(tuple(o.shape), o.dtype) for o in of] for of in (outputs, returned))
        assert got == want, f"returned {got}, the body returns {want}"
    elif outputs and all(tensor.layout == torch.strided for tensor in given):
        raise AssertionError(f"accepted arguments that the body rejects: {returned}")
    assert not storages(outputs) & storages(given), "an output is an input"
    if any(output.requires_grad for output in outputs):
        with contextlib.suppress(Exception):
            sum(output.sum() for output in outputs if output.requires_grad).backward()
    return "succeeded"


def storages(tensors: Sequence[Tensor]) -> set[int]:
    real = (
        tensor
        for tensor in tensors
        if tensor.layout == torch.strided and not (tensor.is_meta or tensor._is_zerotensor())
    )
    return {tensor.untyped_storage().data_ptr() for tensor in real} - {0}


def materialized(values: dict[str, Any], written: set[str]) -> dict[str, Any]:
    """The values, with tensors made from their descriptions."""
    shared = {value.argument for value in flattened(values.values(), Same)}
    made: dict[str, Any] = {}

    def one(argument: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(argument, each) for each in value]
        return value.make(argument in written or argument in shared) if isinstance(value, Made) else value

    made = {argument: one(argument, value) for argument, value in values.items()}

    def same(value: Any) -> Any:
        if isinstance(value, list):
            return [same(each) for each in value]
        return made[value.argument] if isinstance(value, Same) else value

    return {argument: same(value) for argument, value in made.items()}


def flattened(values: Any, kind: type = Tensor) -> list:
    found = []
    for value in values:
        found += flattened(value, kind) if isinstance(value, list) else [value] if isinstance(value, kind) else []
    return found


def body_returns(name: str, made: dict[str, Any]) -> tuple[Tensor, ...] | Exception | None:
    """Outputs or exception of the operator's body on the meta device; None for operators or tensors without one."""
    if any(tensor.layout != torch.strided for tensor in flattened(made.values())):
        return None
    name = name.removesuffix("_autograd")  # the same operator
    if name not in registry.operators:
        return None
    body, schema = registry.operators[name].native, getattr(torch.ops.dspnet, name).default._schema

    def without_data(value: Any) -> Any:
        if isinstance(value, list):
            return [without_data(each) for each in value]
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    try:
        with torch.no_grad():
            returned = body(*(without_data(made.get(argument.name)) for argument in schema.arguments))
    except Exception as error:
        return error
    return (returned,) if isinstance(returned, Tensor) else returned


def fuzz(target: Target, count: int, first: int, record: Path) -> collections.Counter[str]:
    """Make `count` calls. Returns the number of each outcome."""
    outcomes: collections.Counter[str] = collections.Counter()

    @seed(first)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(calls(target.name, target.operator._schema))
    def make(values: dict[str, Any]) -> None:
        written_out = f"call({target.way!r}, {target.name!r}, {values!r})"
        record.write_text(f"from fuzzing import *\n\n{written_out}\n")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        outcomes[call(target.way, target.name, values)] += 1

    make()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz every operator with invalid and nearly valid arguments.")
    parser.add_argument("--calls", type=int, default=600, help="total number of calls")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls")
    parser.add_argument("--only", default="", help="only operators whose names contain this")
    parser.add_argument("--record", type=Path, required=True, help="file to write each call to beforehand")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # torch's, about tensor states
    torch.set_num_threads(1)
    if VAST_TENSORS:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    chosen = [target for target in targets() if options.only in target.name]
    failed, idle = [], []
    print(f"{'operator':26} {'by':8}", *(f"{outcome:>9}" for outcome in OUTCOMES))
    for number, target in enumerate(chosen):
        count = options.calls * (number + 1) // len(chosen) - options.calls * number // len(chosen)
        try:
            outcomes = fuzz(target, count, options.seed, options.record)
        except AssertionError:
            traceback.print_exc()
            failed.append(target)
            continue
        print(f"{target.name:26} {target.way:8}", *(f"{outcomes[outcome]:9}" for outcome in OUTCOMES), flush=True)
        if not outcomes["succeeded"] and count >= 100 and target.name in FORMS and target.way != "cuda":
            idle.append(target)
    faulthandler.cancel_dump_traceback_later()
    if failed or idle:
        raise SystemExit(f"failed: {failed}; without a successful call, see FORMS: {idle}")


if __name__ == "__main__":
    main()
