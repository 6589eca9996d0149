"""Lazy views: tensors marked "negated" or "conjugated" whose memory holds other numbers, such as `z.conj().imag`.

PyTorch resolves them before calling an operator and copies the result back to a written one, assuming that the operator
returns its one written argument. For any other operator that fails with an obscure error, or decrements a reference
count too often and crashes the process; so our operators reject lazy views as written arguments.
"""

from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # a registration lasts as long as its Library object


def refuse_where_written(operator: torch._ops.OpOverload) -> None:
    """Make an operator raise RuntimeError if a lazy view is passed for an argument that it writes to."""
    arguments = operator._schema.arguments
    if not any(argument.is_write for argument in arguments):
        return

    def call(*values: Any) -> Any:
        ready = []
        for argument, value in zip(arguments, values, strict=False):  # trailing arguments may be omitted
            several = isinstance(value, (list, tuple))
            tensors = [each for each in (value if several else [value]) if isinstance(each, Tensor)]
            if argument.is_write and any(map(is_lazy, tensors)):
                raise RuntimeError(
                    f"{operator._schema.name}: {argument.name} is written to, so it must not be a lazily negated or "
                    "conjugated view: pass tensor.resolve_neg().resolve_conj()"
                )
            ready.append([_resolved(each) for each in value] if several else _resolved(value))
        return operator(*ready)

    namespace, name = operator._schema.name.split("::")
    library = torch.library.Library(namespace, "IMPL")
    for key in ("Negative", "Conjugate"):
        library.impl(name, call, key)
    _libraries.append(library)


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor is a lazily negated or conjugated view."""
    return tensor.is_neg() or tensor.is_conj()


def _resolved(value: Any) -> Any:
    return value.resolve_neg().resolve_conj() if isinstance(value, Tensor) else value
