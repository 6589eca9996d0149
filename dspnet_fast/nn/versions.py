"""Tells whether weights have changed since a measurement."""

from __future__ import annotations

from typing import Any

from torch import nn

CHANGED = -1  # version of a weight that had changed before it was copied


class WeightVersions:
    """The parameters of a network and their versions, which PyTorch counts up with every change in place.

    Optimizers, `load_state_dict` and averages of weights change parameters in place; `load_state_dict(assign=True)`
    replaces them. Changes through `.data` are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        # The modules' own dictionaries of parameters, which show a parameter that replaces another one.
        self._parameters = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._versions = [parameter._version for _, _, parameter in self._parameters]

    def unchanged(self) -> bool:
        """Whether no parameter has changed."""
        pairs = zip(self._parameters, self._versions, strict=True)
        return all(of.get(name) is known and known._version == version for (of, name, known), version in pairs)

    def __getstate__(self) -> dict[str, Any]:  # copies count from their own versions
        return {"parameters": self._parameters, "unchanged": self.unchanged()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parameters = state["parameters"]
        self._versions = [known._version if state["unchanged"] else CHANGED for _, _, known in self._parameters]
