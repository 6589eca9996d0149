"""The compiled library (csrc/) as the provider `cpp`: loads it once, and gives the reason if it cannot.

DSPNET_LIBRARY is the path of another build of the library, for example that of `make sanitize`.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import capability
from . import lazy_views

PACKAGE = Path(__file__).parent.parent
LIBRARY = Path(os.environ.get("DSPNET_LIBRARY") or PACKAGE / "_C.so")


@functools.cache
def load() -> tuple[bool, str]:
    """Load the library once. Returns (True, "") or (False, reason)."""
    loaded, reason = load_into(LIBRARY, "the compiled library")
    if loaded:
        for full in torch._C._dispatch_get_all_op_names():
            namespace, name = full.split("::")
            if namespace == "dspnet_cpp":
                lazy_views.refuse_where_written(getattr(torch.ops.dspnet_cpp, name).default)
    return loaded, reason


def builds() -> list[str]:
    """The CPU capabilities that the library was built for. Empty if it cannot be loaded."""
    return _capabilities(json.loads(LIBRARY.with_suffix(".json").read_text())) if load()[0] else []


def is_fast(precision: str) -> bool:
    """Whether a training step by this library was measured to be faster than in plain PyTorch, in fp32 or bf16.

    Not so for DEFAULT: slower on x86, not measured on aarch64. And not so in bf16 for AVX2 on a CPU with AVX-512, which
    oneDNN uses.
    """
    if not load()[0]:
        return False
    build = torch.ops.dspnet_cpp.cpu_capability()
    return build == "AVX512" or (build == "AVX2" and (precision == "fp32" or not capability.executes("AVX512")))


def load_into(library: Path, name: str) -> tuple[bool, str]:
    """Load a library, called `name` in messages, into torch.ops.dspnet_cpp. Returns (True, "") or (False, reason)."""
    try:
        note = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return False, f"{name} is missing: install the project (pip install -e . --no-build-isolation)"
    if "reason" in note:
        return False, f"{name} was not built: {note['reason']}"
    if note["torch"] != torch.__version__:
        return False, f"{name} was built for torch {note['torch']}, not {torch.__version__}: install the project again"
    if problem := capability.problem(name, _capabilities(note)):
        return False, problem
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"{name} cannot be loaded: {error.__cause__ or error}"
    return True, ""


def _capabilities(note: dict) -> list[str]:
    return note.get("capabilities", capability.ORDER)  # absent from the CUDA library's note


def has(operator: str) -> tuple[bool, str]:
    """Whether the library can be loaded and contains the operator. Returns (True, "") or (False, reason)."""
    loaded, reason = load()
    if loaded and not hasattr(torch.ops.dspnet_cpp, operator):
        return False, "the compiled library is older than this operator: install the project again"
    return loaded, reason


def stores(x: torch.Tensor) -> tuple[bool, str]:
    """Whether the operators on activations support the dtype of x. Returns (True, "") or (False, reason)."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False, f"it supports float32 and bfloat16, not {x.dtype}"
    return True, ""


def caller(name: str) -> Callable[..., Any]:
    """The library's function of this name, looked up when it is called."""
    return lambda *args: getattr(torch.ops.dspnet_cpp, name)(*args)


def serve(
    operator: Any,
    accepts: Callable[..., tuple[bool, str]] | None = None,
    without: Sequence[str] = (),
    autograd: bool = False,
    only_by_name: str = "",
) -> None:
    """Register the library's function with the operator's name as its provider `cpp`.

    Args:
        operator: the operator.
        accepts: as of Operator.provider.
        without: parameters that the function does not have; the operator's checks of these run before it.
        autograd: whether the library also has a function <name>_autograd, which records the gradient.
        only_by_name: as of Operator.provider.
    """
    kept = [place for place, name in enumerate(operator.parameters) if name not in without]
    checks = [(check, places) for check, places in operator.checks if not {*places} <= {*kept}]

    def run_without(*args: Any) -> Any:
        for check, places in checks:
            check(*map(args.__getitem__, places))
        return getattr(torch.ops.dspnet_cpp, operator.name)(*map(args.__getitem__, kept))

    options = {} if accepts is None else {"accepts": accepts}
    last = f"{operator.name}_autograd" if autograd else operator.name
    register = operator.provider(
        "cpp",
        devices=("cpu",),
        supported=functools.partial(has, last),
        autograd=caller(last) if autograd else None,
        only_by_name=only_by_name,
        **options,
    )
    register(run_without if without else caller(operator.name))
