"""Base class of modules that can be reduced to a prefix of their units."""

from torch import Tensor, nn

from .recomputation import follow


class Sized(nn.Module):
    """A module of `full_size` units (output channels, output features or blocks) that uses the first `size` of them."""

    active_size: int | None = None  # None: full_size

    @property
    def full_size(self) -> int:
        """Number of units of the full network."""
        raise TypeError(f"{type(self).__name__} must define full_size")

    @property
    def size(self) -> int:
        """Number of units in use."""
        follow()
        return self.full_size if self.active_size is None else self.active_size


def main_grad(parameter: Tensor | None) -> Tensor | None:
    """The parameter's attribute `main_grad`: a buffer of its shape to which operators add the gradient of a prefix.

    `train/pretraining/flat_buffers.py` sets it to a view of a flat buffer. Without it, autograd receives full-size
    gradients that are zero outside the prefix, so the layers work in any training code.
    """
    return getattr(parameter, "main_grad", None)
