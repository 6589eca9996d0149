"""What every layer that can be cut to a prefix has in common."""

from torch import Tensor, nn


class Sized(nn.Module):
    """A module of `full_size` units (output channels, output features or blocks) of which the first `size` are used."""

    active_size: int | None = None  # None: all of them

    @property
    def full_size(self) -> int:
        """Number of units the parameters are allocated for."""
        raise TypeError(f"{type(self).__name__} must define full_size")

    @property
    def size(self) -> int:
        """Number of units in use."""
        return self.full_size if self.active_size is None else self.active_size


def main_grad(parameter: Tensor | None) -> Tensor | None:
    """The full-size buffer that operators add the gradient of a prefix to, if the parameter carries one.

    `train/pretraining/flat_buffers.py` sets it to a view of one flat tensor. Without it, autograd receives full-size
    gradients that are zero outside the prefix, so the layers work in any training code.
    """
    return getattr(parameter, "main_grad", None)
