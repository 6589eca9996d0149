"""The multi-layer perceptron that BYOL uses as projector and as predictor."""

from torch import Tensor, nn

from ..nn import SlimBatchNorm1d, SlimLinear


class MLP(nn.Module):
    """Linear - BN - ReLU - Linear, [N, F] -> [N, out_features] (DSPNet appendix A.1: 4096 hidden, 256 out).

    The first layer uses as many of its `in_features` columns as the input has features; everything after it is shared
    by all subnets.
    """

    def __init__(self, in_features: int, hidden_features: int = 4096, out_features: int = 256) -> None:
        super().__init__()
        self.fc1 = SlimLinear(in_features, hidden_features, bias=False)  # the batch norm's shift is its bias
        self.bn1 = SlimBatchNorm1d(hidden_features)
        self.act1 = nn.ReLU(inplace=True)
        self.fc2 = SlimLinear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Project [N, F] to [N, out_features]."""
        return self.fc2(self.act1(self.bn1(self.fc1(x))))
