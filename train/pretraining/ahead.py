"""Compile the Triton kernels of a run before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dspnet_fast.ops import ahead, registry
from dspnet_fast.statistics import post_statistics

from ..config import PretrainConfig
from ..distributed.batch_split import split_batch
from ..evaluation.features import representations
from ..teachers.targets import random_targets
from .dspnet import VIEWS, build_model
from .flat_buffers import FlatBuffers
from .probe import BATCH

if TYPE_CHECKING:
    from dspnet_fast.kernels.ahead import Launch


def step_launches(config: PretrainConfig, world_size: int = 1) -> list[Launch]:
    """The distinct Triton launches of a run under the current policy: of its steps with all subnets, and of its probe.

    They are recorded on meta tensors of a rank's micro-batch, so nothing is computed.
    """
    split = split_batch(config, world_size)
    with torch.device("meta"):
        model = build_model(config, split.bn_groups).to(memory_format=torch.channels_last).train()
        FlatBuffers(model.online, model.target)
        count = VIEWS * config.batch_size // (world_size * split.micro_batches)
        images, probed = (
            torch.empty(n, config.in_channels, config.image_size, config.image_size).to(
                memory_format=torch.channels_last
            )
            for n in (count, BATCH)
        )

        teacher = random_targets(config, images.device)
        taught = None if teacher is None else teacher(0, images)

        def run() -> None:
            model.accumulate(images, list(model.family), taught=taught)
            if config.probe_epochs:
                post_statistics(model.online.encoder, model.family, [probed])
                list(representations(model.online.encoder, model.family, [probed]))

        return ahead.record(run)


def compile_kernels(
    config: PretrainConfig,
    device: torch.device,
    report: Callable[[str], object],
    world_size: int = 1,
    policy: str | None = None,
) -> None:
    """Compile the Triton kernels of a run on a GPU, if its operators use Triton, in a process per core.

    At their first launch, one after another, they would take minutes, and other ranks would time out. One rank of each
    machine calls this, when the precision of products is set (`configure_cuda`).

    Args:
        config: the run's configuration.
        device: the run's device.
        report: called with lines about the progress.
        world_size: number of ranks.
        policy: the policy of the run [the current one].
    """
    if device.type != "cuda":
        return
    before = registry.get_policy()
    registry.set_policy(policy or before)
    try:
        if "triton" in registry.serving("cuda").values():
            launches = step_launches(config, world_size)
            ahead.compile_launches(launches, torch.cuda.get_device_capability(device), report)
    finally:
        registry.set_policy(before)
