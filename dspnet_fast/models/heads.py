"""The multi-layer perceptron used as BYOL's projector and predictor."""

from torch import Tensor, nn

from ..nn import SlimBatchNorm1d, SlimLinear


class MLP(nn.Module):
    """Linear - BN - ReLU - Linear, [N, F] -> [N, out_features].

    The first layer uses as many columns as the input has features; all subnets share everything after it.

    Args:
        in_features: features of the full network.
        hidden_features: hidden units; 4096 in DSPNet, appendix A.1.
        out_features: output features; 256 in DSPNet.
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
