"""Changes of modules that a context manager reverts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn


class AttributeChanges:
    """Changed attributes of modules, none of them parameters, buffers or modules.

    As a context manager it restores the previous values on exit.
    """

    def __init__(self) -> None:
        self._previous: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module and remember its previous value."""
        self._previous.append((module, attribute, getattr(module, attribute)))
        vars(module)[attribute] = value  # nn.Module.__setattr__ is slow: it looks for parameters and modules

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for module, attribute, value in reversed(self._previous):
            vars(module)[attribute] = value


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; on exit, its modules that were in training mode are so again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
