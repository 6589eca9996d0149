"""The state of a pretraining run and its one step, without files, screens or data loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.subnets import sandwich

from .arena import Arena
from .config import PretrainConfig
from .data.loader import prepare
from .dspnet import DSPNet
from .graphs import StepGraphs
from .ranks import ALONE, Ranks
from .schedules import learning_rate, momentum_alpha, target_tau


def build_model(config: PretrainConfig, ranks: Ranks = ALONE) -> DSPNet:
    """The networks of a run before its first step, a function of the configuration alone."""
    groups, rest = divmod(config.bn_groups or ranks.size, ranks.size)
    if rest or not groups:
        raise InputError(
            f"the batch is normalised in {config.bn_groups} parts, which {ranks.size} ranks cannot share: "
            f"start as many ranks as divide it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DSPNet(
            config.network,
            family(config.network, config.names()),
            config.stem,
            config.hidden_features,
            config.out_features,
            config.momentum_bn,
            config.precision,
            groups,
        )


class Trainer:
    """Model, momentum and step count of a run.

    Everything else that a step depends on (learning rate, tau, alpha, sampled subnets) is a function of the step
    count, so `state` and `load_state` are all that a bit-exact resume needs.

    Args:
        config: the run.
        epoch_steps: steps in an epoch.
        device: where to train.
        ranks: the processes that train together, each on its share of every batch.
    """

    def __init__(self, config: PretrainConfig, epoch_steps: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.model = build_model(config, ranks).to(device).to(memory_format=torch.channels_last).train()
        self.arena = Arena(self.model.online, self.model.target)
        self._statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        self._alpha = torch.zeros((), device=device)
        self._graphs: StepGraphs | None = None
        self.step = 0
        self.steps = config.epochs * epoch_steps
        self.epoch_steps = epoch_steps
        self.warmup_steps = round(config.warmup_epochs * epoch_steps)
        self.full_only_steps = config.full_only_steps(epoch_steps)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        peak = self.config.base_lr * self.config.batch_size / 256
        return learning_rate(self.step, self.steps, self.warmup_steps, peak)

    @property
    def tau(self) -> float:
        """Decay of the target in the step to come."""
        return target_tau(self.step, self.steps, self.config.tau)

    def train_step(self, batch: Tensor) -> dict[str, Tensor]:
        """One step on two views; returns the losses of the sampled subnets.

        The views are uint8 [2B, C, S, S] on any device, or normalised already, float32 [2B, 3, S, S] on the trainer's;
        B is this rank's share of the batch, and the losses are of that.
        """
        family = self.model.family
        if self.step < self.full_only_steps:
            subnets = [family.full]
        else:
            subnets = sandwich(family, self.config.subnets_per_step, self.config.seed, self.step)
        self._alpha.fill_(momentum_alpha(self.step, self.steps))
        self.arena.schedule(self.learning_rate, self.tau)
        if self._records:
            self._graphs = self._graphs or StepGraphs(self.model, self.arena, batch, self._alpha, self._update)
            losses = self._graphs.accumulate(batch, subnets)
            self._exchange()
            self._graphs.update()
        else:
            losses = self.model.accumulate(prepare(batch, self.device), subnets, self._alpha)
            self._exchange()
            self._update()
        self.step += 1
        return losses

    @property
    def _records(self) -> bool:
        return self.device.type == "cuda" and not self.config.no_cuda_graphs

    def _exchange(self) -> None:
        """Gradients and running statistics become those of the whole batch."""
        self.ranks.average(self.arena.grads)
        self.ranks.average_all(self._statistics)

    def _update(self) -> None:
        config = self.config
        self.arena.update(weight_decay=config.weight_decay, momentum=config.momentum, eta=config.eta)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.model.state_dict(), "momentum": self.arena.momentum()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; InputError if it is of another network or holds no momentum."""
        self.load_weights(state)
        try:
            self.arena.load_momentum(state.get("momentum", {}))
        except ValueError as error:
            raise InputError(f"the checkpoint can be evaluated, but not continued: {error}") from error
        self.step = state["step"]

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over the weights of a checkpoint, of this or another run; InputError if the networks differ."""
        try:
            self.model.load_state_dict(state["model"])
        except (KeyError, RuntimeError) as error:
            raise InputError(f"the checkpoint is of another network: {str(error).splitlines()[-1].strip()}") from error
