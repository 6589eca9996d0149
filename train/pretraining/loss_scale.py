"""Loss scaling for fp16 on the device: without it small gradients would become zero (Micikevicius et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, SMALLEST = 2.0**16, 1.0
GROWTH_STEPS = 2000  # finite steps in a row after which the scale is doubled
SEARCH = 16  # steps that may be skipped while the scale falls from its initial value to 1


class LossScale:
    """A factor of the loss that is halved after a step that is not finite, and doubled after many that are.

    The host never waits for the device, so the passes that use `scale` can be captured in a CUDA graph.

    Attributes:
        scale: float32 scalar on the device, a power of two.
        finite_steps: int64 scalar on the device, the number of finite steps since the scale last changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Adapt the scale to a step: `finite` is a bool scalar on the device."""
        self.finite_steps.add_(1).mul_(finite)
        grows = self.finite_steps >= GROWTH_STEPS
        self.scale.mul_(torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)).clamp_(min=SMALLEST)
        self.finite_steps.mul_(~grows)

    def state(self) -> dict[str, Tensor]:
        """The contents of a checkpoint."""
        return {"scale": self.scale.clone(), "finite_steps": self.finite_steps.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        self.scale.copy_(state["scale"])
        self.finite_steps.copy_(state["finite_steps"])
