"""The gradient all-reduce sends final gradients only, and its pieces cover the flat gradient once."""

import pytest
import torch

from dspnet_fast.models import family
from train.distributed.all_reduce import GradientAllReduce
from train.pretraining.dspnet import DSPNet
from train.pretraining.flat_buffers import FlatBuffers

NETWORKS = {"resnet": ["c8-d1111", "c8-d1121", "c16-d2121"], "mobilenet_v3_large": ["w0.25", "w0.50"]}


class RecordingWorld:
    """A process group that keeps a copy of every piece it is given, and doubles it, as an equal second rank would."""

    size = 2

    def __init__(self):
        self.pieces = []

    def all_reduce_async(self, piece):
        self.pieces.append((piece.storage_offset(), piece.clone()))
        return lambda: piece.mul_(2)


def make(network, precision="fp32"):
    torch.manual_seed(0)
    model = DSPNet(network, family(network, NETWORKS[network]), "small", 32, 16, precision=precision)
    model = model.double() if precision == "fp32" else model
    flat, world = FlatBuffers(model.online, model.target), RecordingWorld()
    parts = [*(f"encoder.{stage}" for stage in model.online.encoder.stages), "projector"]
    return model, flat, world, GradientAllReduce(flat, world), parts


@pytest.mark.parametrize("formulation", ["eager", "native"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_ready_hook_fires_in_backward_order(network, formulation, policy, monkeypatch):
    """After the last backward pass of each module, when its gradients and those of all later modules are final."""
    policy(formulation)
    model, flat, _, all_reduce, parts = make(network)
    ready = {}

    def gradient_ready(self, module):
        self._done[module] += 1
        if self._done[module] == self._passes * (self._encoder_passes if module.startswith("encoder.") else 1):
            ready[module] = flat.grads.clone()

    monkeypatch.setattr(GradientAllReduce, "gradient_ready", gradient_ready)
    all_reduce.overlap(model.online, parts)
    all_reduce.begin(2 * len(model.family), model.encoder_passes)
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):  # micro-batches
        model.accumulate(images, list(model.family))
    assert list(ready) == parts[::-1]
    for module, grads in ready.items():
        start = flat.start(module)
        assert torch.equal(grads[start:], flat.grads[start:])
        assert not torch.equal(grads[:start], flat.grads[:start])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overlap", [False, True])
def test_pieces_cover_the_gradient_once_and_hold_its_final_values(overlap, precision, policy):
    policy("eager")
    model, flat, world, all_reduce, parts = make("resnet", precision)
    model.overlaps_all_reduce = overlap
    if overlap:
        all_reduce.overlap(model.online, parts)
    for _ in range(2):
        world.pieces.clear()
        all_reduce.begin(len(model.family), model.encoder_passes)
        model.accumulate(torch.randn(8, 3, 16, 16, dtype=flat.grads.dtype), list(model.family))
        local = flat.grads.clone()
        sent_early = len(world.pieces)
        all_reduce.finish()
        assert bool(sent_early) == overlap
        torch.testing.assert_close(flat.grads, 2 * local, rtol=0, atol=0)
        covered = sorted((start, start + len(piece)) for start, piece in world.pieces)
        assert covered[0][0] == 0 and covered[-1][1] == len(flat.grads)
        assert all(end == start for (_, end), (start, _) in zip(covered, covered[1:], strict=False))
        for start, piece in world.pieces:
            assert torch.equal(piece, local[start : start + len(piece)]), "a piece was sent before it was final"
        flat.grads.zero_()


def test_passes_outside_a_step_send_nothing():
    model, _, world, all_reduce, parts = make("resnet")
    all_reduce.overlap(model.online, parts)
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    model.accumulate(images, [model.family.full])
    with torch.no_grad():
        model.loss(images, model.targets(images), model.family.full)
    assert not world.pieces
