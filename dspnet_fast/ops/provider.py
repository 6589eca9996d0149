"""Providers: the implementations of operators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Verdict = tuple[bool, str]  # (True, "") or (False, reason)


@dataclass(frozen=True)
class Provider:
    """One implementation of one operator.

    Attributes:
        name: one of `registry.PROVIDERS`.
        run: the implementation, called with the operator's arguments.
        devices: supported device types.
        supported: whether this machine can run it; called once, when first needed.
        accepts: whether it supports the arguments at `places`; called on every call.
        places: positions of the arguments that `accepts` takes.
        unproven: reason why `auto` does not choose it, or empty.
        only_by_name: reason why neither `auto` nor `any` chooses it, or empty.
        autograd: as `run`, for arguments that require gradients: its results call the provider of the gradient's
            operator, without Python. None if there is no such function.
    """

    name: str
    run: Callable[..., Any]
    devices: tuple[str, ...]
    supported: Callable[[], Verdict]
    accepts: Callable[..., Verdict]
    places: tuple[int, ...]
    unproven: str
    only_by_name: str
    autograd: Callable[..., Any] | None = None
