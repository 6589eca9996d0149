"""`python -m train.pretrain`: pretrain a family of networks on unlabelled images."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry

from . import cli, planning
from .called import as_called
from .config import PretrainConfig
from .data import augment
from .data.backends import choose_backend, open_batches
from .data.bad import BadImages
from .data.images import ImageSet, Subset
from .data.order import EpochOrder
from .data.sets import open_images
from .evaluation.collapse import ADVICE, LEAST_RANK, LEAST_STD, collapsed
from .guard import TOO_MANY
from .probe import Probe
from .ranks import join, leave
from .run import atomic, checkpoint
from .run.device import choose_device
from .run.interruption import Interruption
from .run.meter import Meter
from .run.process import settle_in
from .run.progress import Monitor
from .run.rundir import RunLog, open_run, read_bad_images, with_own_config, write_bad_images
from .trainer import Trainer
from .watchdog import Watchdog

DESCRIPTION = """\
Pretrain a family of networks that share their weights, on images without labels.
Then compare them with train.evaluate, and cut them out with train.export."""
EXAMPLE = """\
  python -m train.pretrain --fast-kernels --data fashion-mnist --network resnet --stem small --image-size 28 \\
      --dns c16-d1111,c16-d2222,c32-d2222 --epochs 5 --warmup-epochs 1 --out runs/first
  python -m train.pretrain --out runs/first --resume
  python -m train.pretrain --config recipes/dspnet_mobilenet-v3_imagenet_300e.yaml --dry-run"""


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
        images = open_train_images(config)
        share = {"rank": ranks.rank, "world_size": ranks.size}
        order = EpochOrder(len(images), config.batch_size, config.seed, config.epochs, **share)
        # kept with the run: with other ranks it is still the same run
        config = replace(config, bn_groups=config.bn_groups or ranks.size * config.accumulate)
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
        say = print if ranks.first else str
        state = checkpoint.load_newest(self.checkpoints, device, say)
        if state is not None:
            self.trainer.load_state(state)
        elif config.init_from is not None:
            self.trainer.load_weights(checkpoint.load_of_run(Path(config.init_from), device, say))
        order = EpochOrder(len(images), config.batch_size, config.seed, config.epochs, self.trainer.step, **share)
        views = augment.byol(config.image_size, config.min_scale)
        batches = open_batches(config.data_backend, images, views, order, config.workers, self.bad, device)
        self.meter = Meter(iter(batches))
        self.images = images
        self.watchdog = Watchdog(ranks, config.patience, self.out / "stalled.txt", self._say_anywhere)
        self.skipped = self.trainer.guard.skipped().in_all

    def run(self) -> None:
        """Train to the end; KeyboardInterrupt if it was stopped, after saving."""
        trainer, config = self.trainer, self.config
        self.log = RunLog(self.out, trainer.step) if self.ranks.first else None
        self.ranks.wait()  # from here on they listen to each other's heartbeats
        console = Console(highlight=False, quiet=not self.ranks.first)
        try:
            with (
                Interruption() as interruption,
                Monitor("pretrain", trainer.steps, trainer.step, console) as self.monitor,
                self.watchdog,
            ):
                self._say(*self._description())
                if trainer.step == 0:
                    self._measure()
                settle_in(trainer.device)
                self.meter.restart()
                self.monitor.restart()
                for batch in self._batches():
                    lr, tau = trainer.learning_rate, trainer.tau
                    losses = trainer.train_step(batch)
                    last = trainer.step == trainer.steps
                    self.monitor.advance()
                    too_many = self._tell_skipped()
                    if trainer.step % config.log_steps == 0 or last:
                        self._record(losses, lr, tau)
                    if too_many:
                        self._give_up(batch)
                    began = time.perf_counter()
                    if last or self._due(config.probe_epochs):
                        self._measure()
                    if last or self._due(config.checkpoint_epochs):
                        self._share_bad()
                        self._save()
                    self.meter.pause(began)
                    if not last and self._stops(interruption.requested):
                        self._save_and_stop()
                        interruption.stop()
                self._say(f"pretrained {', '.join(trainer.model.family.names)} in {self.out}")
        finally:
            if self.log is not None:
                self.log.close()

    def _stops(self, requested: bool) -> bool:
        """Whether any rank was asked to stop. On a GPU to ask is to wait for it, so only now and then."""
        if self.ranks.size == 1:
            return requested
        return self._may_wait and self.ranks.any(requested, self.trainer.device)

    @property
    def _may_wait(self) -> bool:
        """Whether to ask the device something; on a GPU that is to wait for it, so only now and then."""
        return self.trainer.device.type == "cpu" or self.trainer.step % self.config.log_steps == 0

    def _tell_skipped(self) -> bool:
        """Say that steps were skipped; whether too many in a row were."""
        if not self._may_wait:
            return False
        skipped = self.trainer.guard.skipped()
        if skipped.in_all > self.skipped:
            self.skipped = skipped.in_all
            self._say(f"step {self.trainer.step}  skipped: its gradient was not finite ({skipped.in_all} steps so far)")
        return skipped.longest_row >= TOO_MANY

    def _give_up(self, batch: Tensor) -> NoReturn:
        """Save, name the first number that is not finite and the images, and end the run."""
        self._save()
        found = self.ranks.gather((self.trainer.diagnose(batch), self._images_of(self.trainer.step - 1)))
        dump = self.out / "nonfinite.json"
        if self.ranks.first:
            of_ranks = [{"found": place and place._asdict(), "batch": images} for place, images in found]
            atomic.write_text(dump, json.dumps({"step": self.trainer.step, "ranks": of_ranks}, indent=1) + "\n")
        first = next((f", from {place} of rank {rank} on" for rank, (place, _) in enumerate(found) if place), "")
        raise InputError(
            f"{TOO_MANY} steps in a row had gradients that are not finite{first}"
            + f"; saved after step {self.trainer.step}, the images are named in {dump}. Look at these, {ADVICE}"
            + (", or store activations with --precision fp32" if self.config.precision != "fp32" else "")
        )

    def _images_of(self, step: int) -> list[str]:
        """The files of this rank's share of a step's batch."""
        config, ranks = self.config, self.ranks
        shown = EpochOrder(
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
            self._save_and_stop()
            raise

    def _save(self) -> None:
        config, trainer = self.config, self.trainer
        keep_every = round(config.keep_epochs * trainer.epoch_steps)
        self.watchdog.at(trainer.step, "writing a checkpoint" if self.ranks.first else "waiting for a checkpoint")
        if self.ranks.first:
            assert self.log is not None
            self.log.sync()
            checkpoint.save(self.checkpoints, trainer.step, trainer.state(), config.keep_checkpoints, keep_every)

    def _save_and_stop(self) -> None:
        self._save()
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
        rate *= self.ranks.size
        stacked = torch.stack(list(losses.values()))
        self.ranks.average(stacked)
        if self.log is None:
            return
        values = dict(zip(losses, stacked.tolist(), strict=True))
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


def make_parser() -> cli.ArgumentParser:
    """All options of the command."""
    parser = cli.parser("pretrain", DESCRIPTION, EXAMPLE)
    cli.add_config_file(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its configuration")
    parser.add_argument(
        "--dry-run", action="store_true", help="build, check and count the costs, without images or run"
    )
    cli.add_options(parser, PretrainConfig)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = make_parser().parse_args(with_own_config(argv))
    config = cli.to_config(PretrainConfig, options)
    if options.dry_run:
        planning.show(planning.plan(config, options.resume))
        return
    if not config.out:
        raise InputError("--out is missing: name a new folder for this run, such as --out runs/first")
    if config.fast_kernels:
        registry.fast_kernels()
    try:
        Pretraining(config, options.resume).run()
    finally:
        leave()


if __name__ == "__main__":
    main()
