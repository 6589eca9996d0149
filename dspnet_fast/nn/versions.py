"""Tells whether weights have changed since a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

CHANGED = -1  # version of a weight that had changed before it was copied


class WeightVersions:
    """The versions of parameters, which PyTorch counts up with every change in place.

    Optimizers, `load_state_dict` and averages of weights change parameters in place. Changes through `.data` are not
    counted.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._versions = [parameter._version for parameter in self._parameters]

    def unchanged(self) -> bool:
        """Whether no parameter has changed."""
        pairs = zip(self._parameters, self._versions, strict=True)
        return all(parameter._version == version for parameter, version in pairs)

    def __getstate__(self) -> dict[str, Any]:  # copies count from their own versions
        return {"parameters": self._parameters, "unchanged": self.unchanged()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parameters = state["parameters"]
        self._versions = [p._version if state["unchanged"] else CHANGED for p in self._parameters]
