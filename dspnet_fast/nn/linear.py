"""Linear layer with a prefix of the weight's input and output features."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import slim_linear
from ..ops.autocast import is_autocasting
from ..ops.registry import uses_pytorch
from .prefix import prefixes
from .sized import Sized, main_grad


class SlimLinear(Sized, nn.Linear):
    """`torch.nn.Linear` that uses the prefix `weight[:size, :C]` for an input of C features.

    The constructor takes the arguments of `torch.nn.Linear`; `in_features` and `out_features` are those of the full
    network.

    Example:
        >>> linear = SlimLinear(16, 4)
        >>> linear(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    @property
    def full_size(self) -> int:
        """Output features."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the active prefix of the weight.

        Args:
            x: [..., C], C at most `in_features`.

        Returns:
            [..., size].

        Raises:
            ValueError: if the input has more than `in_features` features.
        """
        features = x.shape[-1]
        if features > self.in_features:
            raise ValueError(f"SlimLinear has {self.in_features} input features, but the input has {features}")
        grad = main_grad(self.weight)
        casts = is_autocasting(x.device)
        if uses_pytorch(x.device) and (grad is None or casts or x.dtype != self.weight.dtype):
            return F.linear(x, *prefixes(self, self.size, features, like=x))
        bias = None if self.bias is None else self.bias[: self.size]
        return slim_linear(x, self.weight, bias, grad, self.size)  # adds the gradient by the matrix product
