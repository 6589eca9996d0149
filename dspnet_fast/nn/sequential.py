"""A sequence of modules whose last ones can be dropped."""

from torch import Tensor, nn

from .sized import Sized


class SlimSequential(Sized, nn.Sequential):
    """`torch.nn.Sequential` that runs its first `size` modules: the depth dimension of a family.

    Example:
        >>> blocks = SlimSequential(nn.ReLU(), nn.Flatten())
        >>> blocks.active_size = 1
        >>> blocks(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    @property
    def full_size(self) -> int:
        """Number of modules."""
        return len(self)

    def forward(self, x: Tensor) -> Tensor:
        """Run the active prefix of the modules."""
        for module in list(self)[: self.size]:
            x = module(x)
        return x
