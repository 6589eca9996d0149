"""What every layer that can be cut to a prefix has in common."""

from torch import nn


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
