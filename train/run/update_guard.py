"""Steps whose numbers are not finite, in trainings with one optimizer: skipped, counted, and limited in number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspnet_fast.errors import InputError

MAX_IN_A_ROW = 3  # consecutive skipped steps after which a training ends


class UpdateGuard:
    """Decides whether a step may update a model, and restores the running statistics of a skipped step.

    Pretraining has a guard without host synchronisation (`train.pretraining.nonfinite`); this one reads a number per
    step. Call `begin` before the forward pass and `allows` before the update.

    Args:
        model: the model; its gradients are tested.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []
        self._in_a_row = self._total = 0
        self._messages: list[str] = []

    def begin(self) -> None:
        """Save the running statistics."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def allows(self, step: int, loss: Tensor) -> bool:
        """Whether loss, gradients and statistics are finite: a sum is NaN or infinite if one of its terms is.

        Raises:
            InputError: several steps in a row were not finite.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        sums = [tensor.float().sum() for tensor in (loss, *gradients, *self._buffers) if tensor.numel()]
        if torch.stack(sums).sum().isfinite():
            self._in_a_row = 0
            return True
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)
        self._in_a_row += 1
        self._total += 1
        self._messages.append(f"step {step}  skipped: its numbers were not finite ({self._total} steps so far)")
        if self._in_a_row == MAX_IN_A_ROW:
            raise InputError(
                f"{MAX_IN_A_ROW} consecutive steps, up to step {step}, had numbers that are not finite: start again "
                "with a smaller --lr, and check the images and labels"
            )
        return False

    def new_messages(self) -> list[str]:
        """A line for each skipped step since the last call."""
        messages, self._messages = self._messages, []
        return messages
