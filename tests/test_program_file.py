"""A network becomes a program of torch.export that computes the same."""

import io

import pytest
import torch
from torch import nn

from dspnet_fast import program_file


def network() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers).eval()


def test_program_computes_the_same_for_any_batch_size_and_holds_no_paths():
    plain = network()
    content = program_file.convert(plain, 16)
    program = torch.export.load(io.BytesIO(content)).module()
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(program(images), plain(images))
    assert program_file.compare(content, plain, torch.randn(3, 3, 16, 16)) < 1e-5
    assert b".py" not in content


def test_program_of_other_weights_is_refused():
    content, other = program_file.convert(network(), 16), network()
    with pytest.raises(RuntimeError, match=r"the outputs of torch.export differ from PyTorch's by up to"):
        program_file.compare(content, other, torch.randn(3, 3, 16, 16))


def test_network_that_depends_on_values_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(RuntimeError, match=r"torch.export does not support the network: "):
        program_file.convert(Branching(), 8)
