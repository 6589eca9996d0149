"""Fifty steps with other kernels end at the weights of the native ones, as nearly as rounding lets any two runs.

Training amplifies rounding, so the measure is another native run: one that starts with weights of which each is off by
a unit in the last place, or, for bf16, one that stores activations in bf16 as well.
"""

import functools

import pytest
import torch
from torch import Tensor

from dspnet_fast.ops import cpp, registry
from train.config import PretrainConfig
from train.trainer import Trainer

STEPS, BATCH, SIZE = 50, 8, 16
UNIT = torch.finfo(torch.float32).eps
FAST = [
    pytest.param("cpp", "cpu", marks=pytest.mark.skipif(not cpp.load()[0], reason=cpp.load()[1])),
    pytest.param("any", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@functools.cache
def train(policy: str, precision: str = "fp32", nudged: bool = False, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """All online weights before and after."""
    config = PretrainConfig(
        network="resnet",
        dns="c8-d1111,c12-d1111,c16-d1111",
        stem="small",
        image_size=SIZE,
        hidden_features=64,
        out_features=32,
        batch_size=BATCH,
        epochs=1,
        subnets_per_step=3,
        base_lr=1.6,
        warmup_epochs=0,
        full_only_epochs=0,
        precision=precision,
    )
    registry.set_policy(policy)
    trainer = Trainer(config, STEPS, torch.device(device))
    weights = trainer.arena.params
    if nudged:
        weights.mul_(1 + UNIT * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).sign())
    before = weights.cpu().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        trainer.train_step(torch.cat((images, images.flip(3))))
    return before, weights.cpu().clone()


def apart(after: Tensor) -> float:
    """From where the native run ends, as a share of the way that it went."""
    before, native = train("native")
    return ((after - native).norm() / (native - before).norm()).item()


@pytest.mark.parametrize(("provider", "device"), FAST)
def test_fp32_ends_as_near_as_a_run_off_by_a_unit(policy, provider, device):
    chance = apart(train("native", nudged=True)[1])
    assert 0 < chance < 0.2  # or the comparison would say nothing
    assert apart(train(provider, device=device)[1]) <= 2 * chance


@pytest.mark.parametrize(("provider", "device"), FAST)
def test_bf16_ends_as_near_as_native_bf16(policy, provider, device):
    chance = apart(train("native", "bf16")[1])
    assert 0 < chance < 0.5
    assert apart(train(provider, "bf16", device=device)[1]) <= 1.5 * chance
