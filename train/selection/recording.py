"""The operator calls of a run, recorded on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dspnet_fast.nn import activate
from dspnet_fast.ops import registry
from dspnet_fast.statistics import post_statistics
from dspnet_fast.verification.calls import Call, record

from ..config import PretrainConfig
from ..distributed.batch_split import split_batch
from ..pretraining.dspnet import VIEWS
from ..pretraining.trainer import Trainer
from ..teachers.targets import random_targets

MEASURED = 3  # images in recorded measurements, an odd number
SHAPE_OPTIONS = (
    "network",
    "dns",
    "stem",
    "hidden_features",
    "out_features",
    "momentum_bn",
    "optimizer",
    "image_size",
    "subnets_per_step",
    "precision",
    "tf32",
    "cudnn",
    "no_cuda_graphs",
)
TEACHER_OPTIONS = ("teacher_features", "self_weight")  # others, of runs with a teacher
LOCAL_OPTIONS = ("local_weight", "teacher_map_channels")  # others, of runs with --local-weight


def shape_of(config: PretrainConfig, world_size: int) -> dict[str, Any]:
    """Everything in a configuration that the shapes of a step on one rank depend on."""
    split = split_batch(config, world_size)
    images = config.batch_size // world_size
    return {
        **{name: getattr(config, name) for name in SHAPE_OPTIONS},
        **({} if config.in_channels == 3 else {"in_channels": config.in_channels}),
        **({name: getattr(config, name) for name in TEACHER_OPTIONS} if config.teacher is not None else {}),
        **({name: getattr(config, name) for name in LOCAL_OPTIONS} if config.local_weight else {}),
        "images": images,
        "micro_batch": images // split.micro_batches,
        "bn_groups": split.bn_groups,
        "ranks_per_group": split.ranks_per_group,
    }


def micro_batch_config(config: PretrainConfig, world_size: int, images: int | None = None) -> PretrainConfig:
    """The configuration of one process whose steps are a rank's micro-batches of a run.

    Args:
        config: the run's configuration.
        world_size: number of ranks of the run.
        images: number of images, if fewer; every ghost batch norm group keeps two or more, as it has in the run.
    """
    split = split_batch(config, world_size)
    in_run = config.batch_size // (world_size * split.micro_batches * split.bn_groups)
    in_group = in_run if images is None else min(in_run, max(2, images // split.bn_groups))
    return replace(
        config,
        batch_size=in_group * split.bn_groups,
        bn_groups=split.bn_groups,
        grad_accum_steps=1,
        overlap_all_reduce=False,
        full_only_epochs=0.0,  # every subnet is trained from the first step on
    )


def calls_of(config: PretrainConfig) -> list[Call]:
    """The operator calls of a training step of every subnet, of the target, and of measuring every subnet."""
    meta = torch.device("meta")
    with meta:
        trainer = Trainer(replace(config, no_cuda_graphs=True), 1, meta)
    model, views = trainer.model, VIEWS * config.batch_size
    images = torch.empty(views, config.in_channels, config.image_size, config.image_size, device=meta)
    images = images.contiguous(memory_format=torch.channels_last)
    teacher = random_targets(config, meta)
    taught = None if teacher is None else teacher(0, images)

    def run() -> None:
        model.accumulate(images, list(model.family), torch.zeros((), device=meta), taught)
        trainer.update()
        post_statistics(model.online.encoder, model.family, [images[:MEASURED]])
        for subnet in model.family:
            with torch.no_grad(), activate(model.online.encoder, subnet):
                model.online.encoder(images[:MEASURED])

    before = registry.get_policy()
    registry.set_policy("native")  # the fused formulation, without providers
    try:
        return record(run)
    finally:
        registry.set_policy(before)
