"""The table of architectures is made by checks that pass, fail and refuse."""

import pytest
import torch
from torch import nn

from benchmarks import architectures


@pytest.mark.parametrize(("name", "compiles"), [("timm:lcnet_050", False), ("torchvision:squeezenet1_1", True)])
def test_sample_of_networks_passes_every_check(name, compiles):
    result = architectures.check(name, compiles)
    assert all(result[check] for check in architectures.CHECKS if check != "compile" or compiles)
    assert 0.1 < result["share"] < 0.6


def test_network_of_two_graphs_fails_the_compile_check():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.head(x)

    assert architectures._compiles(nn.Linear(4, 4), torch.randn(2, 4), [None])
    assert not architectures._compiles(Broken(), torch.randn(2, 4), [None])


def test_refused_network_has_its_reason(monkeypatch):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 10, 1)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), 16, 64, 64)).mean((2, 3))

    monkeypatch.setattr(architectures, "build", lambda name: Constant())
    assert "at width 0.25" in architectures.check("timm:constant")["refused"]


def test_page_counts_networks_that_pass_every_check():
    passing = dict.fromkeys(architectures.CHECKS, True) | {"share": 0.25}
    results = [
        {"name": "timm:resnet18", **passing},
        {"name": "timm:resnet50", **passing, "slim": False},
        {"name": "timm:skresnet18", "refused": "a|b"},
        {"name": "timm:convnext_atto", **passing, "compile": None},
    ]
    del results[0]["compile"]
    text = architectures.page(results)
    assert "1 of the 3 convolutional networks pass every check made, 1 of the 1 others" in " ".join(text.split())
    assert "| timm:resnet18 | yes | yes | yes | yes | yes |  | 25% |" in text
    assert "| timm:resnet50 | yes | yes | no | yes | yes | yes | 25% |" in text and "refused: a/b" in text
    assert "| timm:convnext_atto | yes | yes | yes | yes | yes | - | 25% |" in text
    assert "2 networks were checked for it" in " ".join(text.split())
