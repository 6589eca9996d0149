"""Heads of pretraining: BYOL's projector and predictor, and the prediction of a teacher's features."""

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


class TeacherHead(nn.Module):
    """Linear - BN, [N, F] -> [N, teacher_features].

    The batch norm centres the predictions, as the teacher's features are centred that they are compared with. The
    linear layer uses as many columns as the input has features.

    Args:
        in_features: features of the full network.
        teacher_features: features of the teacher.

    Example:
        >>> TeacherHead(8, 5)(torch.randn(4, 6)).shape
        torch.Size([4, 5])
    """

    def __init__(self, in_features: int, teacher_features: int) -> None:
        super().__init__()
        self.fc = SlimLinear(in_features, teacher_features, bias=False)  # the batch norm's shift is its bias
        self.bn = SlimBatchNorm1d(teacher_features)

    def forward(self, x: Tensor) -> Tensor:
        """Predict a teacher's features from features [N, F]."""
        return self.bn(self.fc(x))
