"""slimmable() with layers whose tensors hooks compute or other modules read, and modules that it refuses at once."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dspnet_fast.nn import SlimBatchNorm1d, activate, slimmable
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics

IMAGES = torch.randn(2, 3, 8, 8)
TOKENS = torch.randn(2, 7, 16)


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))


def weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return nn.utils.weight_norm(layer)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)


class Tokens(nn.Module):
    """A layer from tokens to tokens between two linear ones."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(16, 32), layer, nn.Linear(32, 3)

    def forward(self, x):
        y = self.embed(x)
        y = self.layer(y, y) if isinstance(self.layer, nn.Transformer) else self.layer(y)
        return self.head(y[0] if isinstance(y, tuple) else y)


def check(model, x, width=0.5):
    """The full network is unchanged, and the one cut out equals the subnet, with and without gradients."""
    model.eval()
    with torch.no_grad():
        before = model(x)
    slimmable(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    with activate(model, width):
        wanted = model(x)
        wanted.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
    small = slim(model, width, x)
    torch.testing.assert_close(small(x), wanted)
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("of", "share"),
    [
        (weight_norm, 0.4),
        (parametrizations.weight_norm, 0.4),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), 0.4),
        (nn.utils.spectral_norm, 1),  # the largest singular value is that of the whole weight
        (parametrizations.spectral_norm, 1),
    ],
)
def test_weights_computed_by_hooks_follow_the_channels(of, share):
    model = convolutions()
    of(model[2])
    assert check(model, IMAGES) <= share


def test_weights_that_an_earlier_pass_has_computed_are_no_obstacle():
    model = convolutions()
    prune.l1_unstructured(model[2], "weight", 0.5)
    model(IMAGES).sum().backward()  # leaves a tensor that cannot be copied
    slimmable(model, IMAGES)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        lambda: nn.TransformerEncoder(encoder_layer(activation="gelu"), 2),
        lambda: encoder_layer(norm_first=True),
        lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
    ],
)
def test_transformers_of_torch_in_evaluation_with_and_without_gradients(layer):
    assert check(Tokens(layer()), TOKENS) < 0.35


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_and_what_they_read_stay_whole(kind):
    assert check(Tokens(kind(32, 32, batch_first=True)), TOKENS) == 1


def test_pooled_channels_stay_whole():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.MaxPool3d((2, 1, 1)), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1))
    assert 0.5 < check(model, IMAGES) < 1


def on_meta():
    with torch.device("meta"):
        return convolutions()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(convolutions()), r"the network \(.*\) cannot be slimmed: TorchScript hides"),
        (lambda: torch.jit.trace(convolutions(), IMAGES), "TorchScript hides"),
        (lambda: torch.compile(convolutions(), backend="eager"), "pass the network that it was made from, and compile"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), r"^0 \(torch.*LazyConv2d\) .*: run the network once$"),
        (on_meta, r"^0 \(torch.*Conv2d\) .* on the meta device, without values: load them first$"),
    ],
)
def test_modules_that_cannot_be_traced_are_refused_with_a_remedy(make, reason):
    with pytest.raises(TypeError, match=reason):
        slimmable(make())


def test_quantised_layers_are_refused():
    quantised = pytest.importorskip("torch.ao.nn.quantized")
    with pytest.raises(TypeError, match=r"^1 \(torch\.ao\..*Conv2d\) .* pass the network before it is quantised$"):
        slimmable(nn.Sequential(nn.Conv2d(3, 8, 1), quantised.Conv2d(8, 4, 1)))


def test_statistics_of_networks_with_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.norm = nn.Linear(4, 16), nn.Linear(6, 16), nn.BatchNorm1d(16)

        def forward(self, x, y):
            return self.norm(self.left(x) + self.right(y))

    inputs = torch.randn(8, 4), torch.randn(8, 6)
    model = slimmable(Sum(), inputs, keep=())
    twin = copy.deepcopy(model).train()
    assert isinstance(model.norm, SlimBatchNorm1d) and post_statistics(model, [0.5], [inputs]) == 8
    with activate(model, 0.5), activate(twin, 0.5):
        torch.testing.assert_close(model(*inputs).mean(0), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(slim(model, 0.5, inputs)(*inputs), model(*inputs))
