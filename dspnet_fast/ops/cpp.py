"""The compiled library, csrc/, as the provider `cpp`: loads it once, and says why where it cannot.

DSPNET_LIBRARY is the path of another build of it, such as that of `make sanitize`.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import lazy_views

PACKAGE = Path(__file__).parent.parent
LIBRARY = Path(os.environ.get("DSPNET_LIBRARY") or PACKAGE / "_C.so")


@functools.cache
def load() -> tuple[bool, str]:
    """Loads the library, once. Returns (True, "") or (False, why not)."""
    loaded, reason = load_into(LIBRARY, "the compiled library")
    if loaded:
        for full in torch._C._dispatch_get_all_op_names():
            namespace, name = full.split("::")
            if namespace == "dspnet_cpp":
                lazy_views.refuse_where_written(getattr(torch.ops.dspnet_cpp, name).default)
    return loaded, reason


def load_into(library: Path, name: str) -> tuple[bool, str]:
    """Loads a library into torch.ops.dspnet_cpp. Returns (True, "") or (False, why not), calling it by its name."""
    try:
        note = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return False, f"{name} is not there: install the project (pip install -e . --no-build-isolation)"
    if "reason" in note:
        return False, f"{name} was not built: {note['reason']}"
    if note["torch"] != torch.__version__:
        return False, f"{name} was built for torch {note['torch']}, not {torch.__version__}: install again"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"{name} cannot be loaded: {error.__cause__ or error}"
    return True, ""


def has(operator: str) -> tuple[bool, str]:
    """Whether the library can be loaded and holds this operator, which one from an older source may not."""
    loaded, reason = load()
    if loaded and not hasattr(torch.ops.dspnet_cpp, operator):
        return False, "the compiled library is older than this operator: install the project again"
    return loaded, reason


def stores(x: torch.Tensor) -> tuple[bool, str]:
    """Whether the operators on activations serve x's dtype."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False, f"it serves float32 and bfloat16, not {x.dtype}"
    return True, ""


def serve(operator: Any, accepts: Callable[..., tuple[bool, str]] | None = None) -> None:
    """Makes the library's function of an operator's name its provider `cpp`."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.dspnet_cpp, operator.name)(*args)

    options = {} if accepts is None else {"accepts": accepts}
    operator.provider("cpp", devices=("cpu",), supported=functools.partial(has, operator.name), **options)(run)
