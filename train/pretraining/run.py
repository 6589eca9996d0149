"""A pretraining run: trains, measures, says how it goes, and saves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry

from ..called import as_called
from ..config import PretrainConfig
from ..data import augmentation
from ..data.backends import choose_backend, open_batches
from ..data.bad_images import BadImages
from ..data.datasets import open_images
from ..data.images import ImageSet, Subset
from ..data.sampler import EpochSampler
from ..distributed.process_group import join
from ..distributed.watchdog import Watchdog
from ..evaluation.collapse import ADVICE, LEAST_RANK, LEAST_STD, collapsed
from ..run import atomic, checkpoint
from ..run.device import choose_device
from ..run.interruption import Interruption
from ..run.meter import Meter
from ..run.process import prepare_process
from ..run.progress import Monitor
from ..run.run_directory import RunLog, check_out, open_run, read_bad_images, write_bad_images
from .nonfinite import TOO_MANY
from .probe import Probe
from .trainer import Trainer

LOOK_SECONDS = 5.0  # a GPU may be ahead of whoever asks whether to stop: clusters wait half a minute at least


def open_train_images(config: PretrainConfig) -> ImageSet:
    """The images that a run trains on."""
    images = open_images(config.data, "train")
    return images if config.train_images is None else Subset.random(images, config.train_images, config.seed)


class Pretraining:
    """A run with its directory and its screen: logs, probes, checkpoints, interruption."""

    def __init__(self, config: PretrainConfig, resume: bool) -> None:
        device = choose_device(config.device)
        self.ranks = ranks = join(device)
        if device.type == "cuda" and ranks.size > 1:
            device = torch.device("cuda", ranks.local)
        if ranks.first:
            check_out(config, resume)  # images may first have to be downloaded
        images = open_train_images(config)
        share = {"rank": ranks.rank, "world_size": ranks.size}
        order = EpochSampler(len(images), config.batch_size, config.seed, config.epochs, **share)
        # kept with the run: with other ranks it is still the same run
        config = replace(config, bn_groups=config.bn_groups or ranks.size * config.grad_accum_steps)
        # what auto chose is kept with the run: another backend would not resume it bit for bit
        config = replace(config, data_backend=choose_backend(config.data_backend, images, device))
        self.config = config
        limit = len(images) // 1000 if config.max_bad_images is None else config.max_bad_images
        self.bad = BadImages(limit, read_bad_images(Path(config.out)) if resume else None)
        self.trainer = Trainer(config, order.steps_per_epoch, device, ranks)
        self.probe = None
        if config.probe_epochs and ranks.first:
            test = open_images(config.data, "test")
            self.probe = Probe(images, test, config.probe_images, config.image_size, device, self.bad)
        self.out = Path(config.out)
        if ranks.first:
            open_run(config, resume)
        ranks.wait()
        self.checkpoints = self.out / "checkpoints"
        self._load()
        order = EpochSampler(len(images), config.batch_size, config.seed, config.epochs, self.trainer.step, **share)
        views = augmentation.byol(config.image_size, config.min_scale)
        batches = open_batches(config.data_backend, images, views, order, config.workers, self.bad, device)
        self.meter = Meter(iter(batches))
        self.images = images
        self.log: RunLog | None = None  # of the first rank, while it runs
        console = Console(highlight=False, quiet=not ranks.first)
        self.monitor = Monitor("pretrain", self.trainer.steps, self.trainer.step, console)
        self.watchdog = Watchdog(ranks, config.stall_timeout, self.out / "stalled.txt", self._say_anywhere)
        self.skipped = self.trainer.guard.skipped().in_all
        self._look_steps = config.log_steps

    def _load(self) -> None:
        """Go on where the run was stopped, or begin with the weights that it is given; all ranks alike."""
        trainer, config, ranks = self.trainer, self.config, self.ranks
        if ranks.first:
            checkpoint.clear_rests(self.checkpoints)
        state = self._newest(self.checkpoints)
        if state is not None:
            trainer.load_state(state)
        elif config.init_from is not None:
            given = Path(config.init_from)
            checkpoint.newest_of_run(given)  # there is one
            trainer.load_weights(self._newest(given / "checkpoints") or {})
        beginnings = ranks.gather((trainer.step, trainer.flat_buffers.checksum()))
        for rank, beginning in enumerate(beginnings):
            if beginning != beginnings[0]:
                raise InputError(
                    f"rank {rank} begins after step {beginning[0]} and rank 0 after step {beginnings[0][0]}, or with "
                    "other weights: all machines must see the same OUT and --init-from and have the same PyTorch"
                )

    def _newest(self, folder: Path) -> dict[str, Any] | None:
        """The newest checkpoint that rank 0 can read, on every rank: machines may not see a new file at once."""
        device, ranks = self.trainer.device, self.ranks
        state = checkpoint.load_newest(folder, device, print) if ranks.first else None
        step = ranks.gather(state and state["step"])[0]
        if step is None or ranks.first:
            return state
        return checkpoint.load(checkpoint.path_of(folder, step), device)

    def run(self) -> None:
        """Train to the end; KeyboardInterrupt if it was stopped, after saving."""
        trainer, config = self.trainer, self.config
        if self.ranks.first:
            self.log = RunLog(self.out, trainer.step)
        self.ranks.wait()  # from here on they listen to each other's heartbeats
        try:
            with Interruption() as interruption, self.monitor, self.watchdog:
                self._say(*self._description())
                if trainer.step == 0:
                    self._measure()
                prepare_process(trainer.device)
                self.meter.restart()
                self.monitor.restart()
                for batch in self._batches():
                    lr, tau = trainer.learning_rate, trainer.tau
                    losses = trainer.train_step(batch)
                    last = trainer.step == trainer.steps
                    self.monitor.advance()
                    too_many = self._tell_skipped(last)
                    if trainer.step % config.log_steps == 0 or last:
                        self._record(losses, lr, tau)
                    if too_many:
                        self._give_up(batch)
                    began = time.perf_counter()
                    if last or self._due(config.probe_epochs):
                        self._measure()
                    if last or self._due(config.checkpoint_epochs):
                        self._save()
                        self._share_bad()
                    self.meter.pause(began)
                    if not last and self._stops(interruption.requested):
                        self._save_and_stop()
                        interruption.stop()
                self._say(f"pretrained {', '.join(trainer.model.family.names)} in {self.out}")
        finally:
            if self.log is not None:
                self.log.close()

    def _stops(self, requested: bool) -> bool:
        """Whether any rank was asked to stop, as soon as that may be asked."""
        if self.ranks.size == 1:
            return requested
        return self._may_wait and self.ranks.any(requested, self.trainer.device)

    @property
    def _may_wait(self) -> bool:
        """Whether to ask the device something; on a GPU that is to wait for it, so only now and then."""
        return self.trainer.device.type == "cpu" or self.trainer.step % self._look_steps == 0

    def _tell_skipped(self, last: bool) -> bool:
        """Say that steps were skipped; whether too many in a row were."""
        if not (last or self._may_wait):
            return False
        skipped = self.trainer.guard.skipped()
        if skipped.in_all > self.skipped:
            self.skipped = skipped.in_all
            step = self.trainer.step - skipped.since
            self._say(f"step {step}  skipped: its numbers were not finite ({skipped.in_all} steps so far)")
        return skipped.longest_row >= TOO_MANY

    def _give_up(self, batch: Tensor) -> NoReturn:
        """Save, name the first number that is not finite and the images, and end the run."""
        self._save()
        since = self.trainer.guard.skipped().since
        step = self.trainer.step - since
        finding = self.trainer.diagnose(batch) if since == 0 else None  # otherwise that batch has gone
        found = self.ranks.gather((finding, self._images_of(step - 1)))
        dump = self.out / "nonfinite.json"
        if self.ranks.first:
            of_ranks = [{"found": place and place._asdict(), "batch": images} for place, images in found]
            atomic.write_text(dump, json.dumps({"step": step, "ranks": of_ranks}, indent=1) + "\n")
        first = next((f", from {place} of rank {rank} on" for rank, (place, _) in enumerate(found) if place), "")
        raise InputError(
            f"{TOO_MANY} steps in a row had numbers that are not finite{first}"
            + f"; saved after step {self.trainer.step}, the images are named in {dump}. Look at these, {ADVICE}"
            + (", or store activations with --precision fp32" if self.config.precision != "fp32" else "")
        )

    def _images_of(self, step: int) -> list[str]:
        """The files of this rank's share of a step's batch."""
        config, ranks = self.config, self.ranks
        shown = EpochSampler(
            len(self.images), config.batch_size, config.seed, config.epochs, step, ranks.rank, ranks.size
        )
        return [self.images.file(index) for _, index in next(iter(shown))]

    def _batches(self) -> Iterator[Tensor]:
        """The batches; an image that cannot be used ends the run, but not before it is saved."""
        at, trainer = self.watchdog.at, self.trainer
        try:
            at(trainer.step, "waiting for images")
            for batch in self.meter.batches():
                self._say_bad()
                at(trainer.step, "training")
                yield batch
                at(trainer.step, "waiting for images")
        except InputError:
            self._say_bad()
            self._save_and_stop(here=True)
            raise

    def _save(self, here: bool = False) -> None:
        """On rank 0; `here`, on a rank that stops without the others. Between steps all hold the same."""
        config, trainer = self.config, self.trainer
        here = here or self.ranks.first
        keep_every = round(config.keep_epochs * trainer.epoch_steps)
        self.watchdog.at(trainer.step, "writing a checkpoint" if here else "waiting for a checkpoint")
        if self.log is not None:
            self.log.sync()
        if here:
            checkpoint.save(self.checkpoints, trainer.step, trainer.state(), config.keep_checkpoints, keep_every)

    def _save_and_stop(self, here: bool = False) -> None:
        self._save(here)
        self._say(
            f"stopped and saved after step {self.trainer.step} of {self.trainer.steps}; continue with",
            f"  {as_called('python -m train.pretrain')} --out {self.out} --resume",
        )

    def _due(self, epochs: float) -> bool:
        return epochs > 0 and self.trainer.step % max(1, round(epochs * self.trainer.epoch_steps)) == 0

    def _say(self, *lines: str) -> None:
        if self.log is None:
            return
        for line in lines:
            self.monitor.line(line)
            self.log.line(line)

    def _say_anywhere(self, line: str) -> None:
        """From any rank and thread."""
        if self.log is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._say(line)

    def _share_bad(self) -> None:
        """Every rank meets bad images of its own."""
        if self.ranks.size > 1:
            for found in self.ranks.gather(self.bad.found):
                self.bad.note(list(found.items()))
            self._say_bad()

    def _say_bad(self) -> None:
        news = self.bad.news()
        if news and self.ranks.first:
            self._say(*news)
            write_bad_images(self.out, self.bad.found)

    def _description(self) -> list[str]:
        trainer, config = self.trainer, self.config
        served = ", ".join(f"{op}: {provider}" for op, provider in registry.serving(trainer.device.type).items())
        return [
            f"{config.network} {', '.join(trainer.model.family.names)} on {len(self.images)} images of {config.data}, "
            f"{config.epochs} epochs of {trainer.epoch_steps} steps, {config.precision} on {trainer.device}, "
            f"data by {config.data_backend}" + (f", {self.ranks.size} ranks" if self.ranks.size > 1 else ""),
            f"operators  {served}",
            *([f"resumed at step {trainer.step}"] if trainer.step else []),
        ]

    def _record(self, losses: dict[str, Tensor], lr: float, tau: float) -> None:
        rate, waiting = self.meter.read()
        figures = torch.stack([*losses.values(), torch.tensor(rate, device=self.trainer.device)])
        self.ranks.average(figures)
        *averaged, rate = figures.tolist()
        rate *= self.ranks.size
        steps = int(LOOK_SECONDS * rate / self.config.batch_size)
        self._look_steps = max(1, min(self.config.log_steps, steps))  # the same on all ranks
        if self.log is None:
            return
        values = dict(zip(losses, averaged, strict=True))
        self.log.metrics(
            self.trainer.step,
            {
                "epoch": self.trainer.step / self.trainer.epoch_steps,
                "loss": values,
                "learning_rate": lr,
                "tau": tau,
                "images_per_second": rate,
                "data_wait": waiting,
                "bad_images": len(self.bad),
                "skipped_steps": self.skipped,
            },
        )
        shown = "  ".join(f"{name} {values[name]:.3f}" for name in self.trainer.model.family.names if name in values)
        bad = f"  bad images {len(self.bad)}" if len(self.bad) else ""
        self.monitor.status(f"loss {shown}  {rate:.0f} img/s  data wait {waiting:.0%}{bad}")

    def _measure(self) -> None:
        if self.probe is None or self.log is None:
            return
        self.watchdog.at(self.trainer.step, "measuring")
        values = self.probe.measure(self.trainer.model.online.encoder, self.trainer.model.family)
        self.log.metrics(self.trainer.step, values)
        for kind, of_subnets in values.items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in of_subnets.items())
            self._say(f"step {self.trainer.step}  {kind}  {shown}")
        spread, rank = values["feature_std"], values["effective_rank"]
        fallen = [name for name in spread if collapsed(spread[name], rank[name])]
        if fallen and self.trainer.step:
            self._say(
                f"step {self.trainer.step}  COLLAPSE of {', '.join(fallen)}: feature std below {LEAST_STD:g} or "
                f"effective rank below {LEAST_RANK:g}, so their features no longer tell images apart; {ADVICE}"
            )
