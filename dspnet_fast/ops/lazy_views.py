"""Tensors that note "negated" or "conjugated" instead of holding the numbers, such as `z.conj().imag`.

PyTorch works them out before an operator sees them, and where the operator writes to one it copies the result back. It
takes for granted that the operator returns the one argument that it writes to; any other fails in a way that nobody can
read, or drops one reference too many and takes the process with it.
"""

from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # what is registered lasts as long as they do


def refuse_where_written(operator: torch._ops.OpOverload) -> None:
    """From now on an operator that writes to arguments raises RuntimeError if such a tensor is one of those."""
    arguments = operator._schema.arguments
    if not any(argument.is_write for argument in arguments):
        return

    def call(*values: Any) -> Any:
        ready = []
        for argument, value in zip(arguments, values, strict=False):  # the last ones may be left to their defaults
            several = isinstance(value, (list, tuple))
            tensors = [each for each in (value if several else [value]) if isinstance(each, Tensor)]
            if argument.is_write and any(map(is_lazy, tensors)):
                raise RuntimeError(
                    f"{operator._schema.name}: {argument.name} is written to, and a lazily negated or conjugated view "
                    "cannot be: give it tensor.resolve_neg().resolve_conj()"
                )
            ready.append([_resolved(each) for each in value] if several else _resolved(value))
        return operator(*ready)

    namespace, name = operator._schema.name.split("::")
    library = torch.library.Library(namespace, "IMPL")
    for key in ("Negative", "Conjugate"):
        library.impl(name, call, key)
    _libraries.append(library)


def is_lazy(tensor: Tensor) -> bool:
    """Whether it is one of these."""
    return tensor.is_neg() or tensor.is_conj()


def _resolved(value: Any) -> Any:
    return value.resolve_neg().resolve_conj() if isinstance(value, Tensor) else value
