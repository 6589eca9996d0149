"""Linear layer whose input and output features are prefixes of the weight's."""

from torch import Tensor, nn

from ..ops import slim_linear
from .sized import Sized, main_grad


class SlimLinear(Sized, nn.Linear):
    """`torch.nn.Linear` that uses `weight[:size, :input features]`.

    Input [..., C] with C at most `in_features`; output [..., size].
    Raises ValueError for an input with more features than `in_features`.
    """

    @property
    def full_size(self) -> int:
        """Output features."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [..., C] by the active prefix of the weight."""
        features = x.shape[-1]
        if features > self.in_features:
            raise ValueError(f"SlimLinear has {self.in_features} input features, the input has {features}")
        bias = None if self.bias is None else self.bias[: self.size]
        return slim_linear(x, self.weight, bias, main_grad(self.weight), self.size)
