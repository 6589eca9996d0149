"""A pretraining run: the training loop with its run directory, log, measurements, checkpoints and ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.models import check_network
from dspnet_fast.models.published import Source
from dspnet_fast.ops import registry

from ..config import PretrainConfig
from ..data.backends import choose_backend, open_batches
from ..data.bad_images import BadImages
from ..data.datasets import open_images
from ..data.datasets.images import ImageDataset, Subset
from ..data.datasets.pixels import PixelFormat
from ..data.pixel_options import read_as, resolve_pixels, resumed_pixels
from ..data.sampler import EpochSampler
from ..data.views import augmentation
from ..distributed.process_group import init_process_group
from ..distributed.watchdog import Watchdog
from ..evaluation.collapse import ADVICE, MIN_RANK, MIN_STD, collapsed
from ..evaluation.verdict import VERDICT
from ..run import checkpoint, loop, trackers
from ..run.data_used import data_used, read_data_used, write_data_used
from ..run.device import choose_device
from ..run.interruption import Interruption
from ..run.log import RunLog, read_metrics
from ..run.meter import Meter
from ..run.process import prepare_process
from ..run.progress import Monitor
from ..run.run_directory import check_out, open_run, raised_epochs, read_bad_images, write_bad_images
from ..run.saved_config import read_config
from ..selection.kernels import Kernels, choose_kernels
from ..teachers.cache import check_cache
from ..teachers.start import teacher_targets
from ..teachers.teacher import Teacher, TeacherFacts, check_same, open_teacher, with_teacher, write_facts
from . import recipe
from .ahead import compile_kernels
from .duration import Duration
from .outcome import verdict_of
from .probe import Probe
from .trainer import Trainer

SYNC_SECONDS = 5.0  # between questions that synchronise the GPU; a cluster waits 30 s or more after asking to stop


def open_train_images(config: PretrainConfig) -> ImageDataset:
    """The images that a run trains on."""
    images = open_images(config.data, "train", unlabelled=config.unlabelled)
    return images if config.train_images is None else Subset.random(images, config.train_images, config.seed)


def resolve(
    config: PretrainConfig,
    images: ImageDataset,
    device: torch.device,
    world_size: int,
    teacher: TeacherFacts | None = None,
) -> PretrainConfig:
    """The configuration with all defaults that depend on data and machine filled in, as OUT/config.yaml keeps it.

    A resumed run reads them there, so it stays the same run on another number of ranks or with other packages.
    """
    config = recipe.complete(config, len(images), world_size)
    return replace(
        with_teacher(config, teacher),
        bn_groups=config.bn_groups or world_size * config.grad_accum_steps,
        data_backend=choose_backend(config.data_backend, images, device, PixelFormat.of(config).eight_bit),
    )


class PretrainRun:
    """One run, new or resumed, on this rank.

    Args:
        config: the run's configuration.
        resume: continue the run in config.out.
        kernels: kernels of a new run with --fast-kernels; chosen here by default.
        allow_untrained: allow subnets that no step trains, as comparisons of --subnets-per-step may have.

    Raises InputError if configuration, images, run directory or process group cannot be used.
    """

    def __init__(
        self, config: PretrainConfig, resume: bool, kernels: Kernels | None = None, allow_untrained: bool = False
    ) -> None:
        device = choose_device(config.device)
        self.world = world = init_process_group(device)
        if device.type == "cuda" and world.size > 1:
            device = torch.device("cuda", world.local_rank)
        if world.is_main:
            trackers.require(config.log_to)
            check_out(config, resume)  # before images are downloaded
            check_network(config.network, config.image_size)
        images = open_train_images(config)
        if resume:
            config = resumed_pixels(config, read_config(Path(config.out), PretrainConfig))
        else:
            config = world.all_gather(resolve_pixels(config, images) if world.is_main else None)[0] or config
        self.format = PixelFormat.of(config)
        self.images = images = read_as(images, self.format)
        if config.teacher is not None and not self.format.eight_bit:
            raise InputError(
                "--teacher needs images that are read as 8-bit grey or RGB: see --pixel-range and --channels"
            )
        self._choices = recipe.chosen(config, len(images), world.size)
        self.out = Path(config.out)
        self.teacher = teacher = self._open_teacher(config, device)
        facts = None if teacher is None else teacher.facts
        if world.is_main and resume:
            check_same(self.out, facts)
        if world.is_main and facts is not None:
            check_cache(config, facts, images)
        self.config = config = resolve(config, images, device, world.size, facts)
        if not allow_untrained:
            recipe.check_sampling(config, len(images))
        self.checkpoints = self.out / "checkpoints"
        limit = len(images) // 1000 if config.max_bad_images is None else config.max_bad_images
        self.bad = BadImages(limit, read_bad_images(self.out, config.data) if resume else None)
        before = read_data_used(self.out) if resume else None
        self._raised = raised_epochs(config) if resume else ""
        epoch_steps = self._sampler().steps_per_epoch if before is None else before.epoch_steps
        self.kernels = kernels
        if config.fast_kernels and (resume or kernels is None):
            self.kernels = choose_kernels(config, config.epochs * epoch_steps, device, world, resume)
        self.trainer = trainer = Trainer(config, epoch_steps, device, world)
        self.probe = None
        self._test: ImageDataset | None = None
        if config.probe_epochs and world.is_main:
            self._test = self._open_test_images()
            self.probe = Probe(images, self._test, config.probe_images, config.image_size, device, self.bad)
        used = data_used(config.data, images, self._test, epoch_steps)
        step = checkpoint.latest_step(self.checkpoints) if resume else 0
        self._data_used, self._data_change = used.resumed(before, step, self.out)
        if not resume:
            self._load_initial()  # before the directory is created: it would stay after an error
        if world.is_main:
            checkpoint.check_room(self.checkpoints, trainer.state(), 1 if resume else config.keep_checkpoints + 1)
            open_run(config, resume)
            write_data_used(self.out, self._data_used)
            if facts is not None:
                write_facts(self.out, facts)
            if self.kernels is not None:
                self.kernels.write(self.out)
        world.barrier()
        if teacher is not None:
            trainer.teacher = teacher_targets(config, teacher, images, self._sampler(), self.bad, device, world)
        self._load(resume)
        views = augmentation.byol(config.image_size, config.min_scale, config)
        sampler = self._sampler(trainer.step, trainer.steps)
        self.meter = Meter(
            iter(open_batches(config.data_backend, images, views, sampler, config.workers, self.bad, device))
        )
        self.log: RunLog | None = None  # on rank 0, while it runs
        self._duration: Duration | None = None  # on rank 0
        self.monitor = Monitor(
            "pretrain", trainer.steps, trainer.step, Console(highlight=False, quiet=not world.is_main)
        )
        self.watchdog = Watchdog(world, config.stall_timeout, self.out / "stalled.txt", self._print_anywhere)
        self._skipped = trainer.guard.skipped().total
        self._sync_steps = config.log_steps
        self._batch: Tensor | None = None

    def _open_teacher(self, config: PretrainConfig, device: torch.device) -> Teacher | None:
        """The teacher, on rank 0 first: it may download weights, or measure the statistics of a run."""
        teacher = open_teacher(config, device) if self.world.is_main else None
        self.world.barrier()
        return teacher if self.world.is_main else open_teacher(config, device)

    def _open_test_images(self) -> ImageDataset:
        """The images that the probe classifies, or, without a usable test split, training images without labels."""
        try:
            images = open_images(self.config.data, "test", unlabelled=self.config.unlabelled)
            return read_as(images, self.format)
        except InputError as error:
            print(f"accuracy is not measured during the run: {error}")
            test = Subset(self.images, range(0, len(self.images), 10))
            test.labels = None
            return test

    def _sampler(self, step: int = 0, steps: int | None = None) -> EpochSampler:
        """This rank's share of the batches from a step to the last of `steps`, by default those of all epochs."""
        config, world = self.config, self.world
        return EpochSampler(
            len(self.images), config.batch_size, config.seed, config.epochs, step, world.rank, world.size, steps
        )

    def _load_initial(self) -> None:
        """Load the weights of --init-from, if it was given."""
        source = self.config.init_from
        if source is None:
            return
        if (published := Source.parse(source)) is not None:
            self.trainer.load_published(published)
            return
        checkpoint.newest_of_run(Path(source))  # raises if there is none
        self.trainer.load_weights(self._newest(Path(source) / "checkpoints") or {})

    def _load(self, resume: bool) -> None:
        """Load the checkpoint to resume, if there is one, and check that all ranks start alike."""
        trainer, world = self.trainer, self.world
        if world.is_main:
            checkpoint.remove_leftovers(self.checkpoints)
        state = self._newest(self.checkpoints)
        if state is not None:
            trainer.load_state(state)
        elif resume:
            self._load_initial()
        starts = world.all_gather((trainer.step, trainer.flat_buffers.checksum()))
        for rank, start in enumerate(starts):
            if start != starts[0]:
                raise InputError(
                    f"rank {rank} starts after step {start[0]} and rank 0 after step {starts[0][0]}, or with other "
                    "weights: all machines must see the same OUT and --init-from and have the same PyTorch"
                )

    def _newest(self, folder: Path) -> dict[str, Any] | None:
        """The newest checkpoint that rank 0 can read, on every rank: machines may see a new file at different times."""
        device, world = self.trainer.device, self.world
        state = checkpoint.load_newest(folder, device, print) if world.is_main else None
        step = world.all_gather(state and state["step"])[0]
        if step is None or world.is_main:
            return state
        return checkpoint.load(checkpoint.path_of(folder, step), device)

    def run(self) -> None:
        """Train to the end. KeyboardInterrupt or SystemExit after saving, if a signal asked to stop."""
        trainer, config = self.trainer, self.config
        events: list[loop.Event[dict[str, Tensor]]] = [
            loop.Event(self._estimate, 1, at_end=False),
            loop.Event(self._check_skipped, 1),
            loop.Event(self._record, config.log_steps),
            loop.Event(self._measure, self._in_steps(config.probe_epochs)),
            loop.Event(self._save, self._in_steps(config.checkpoint_epochs)),
        ]
        if self.world.is_main:
            self.log = RunLog(self.out, trainer.step, trackers.names_of(config.log_to))
            live = None if config.teacher_cache is not None else self.teacher
            cost = None if live is None else live.facts.cost(config, None)
            self._duration = Duration(config, trainer.epoch_steps, trainer.device, cost)
        if self.world.local_rank == 0:
            compile_kernels(config, trainer.device, print if self.world.is_main else lambda line: None, self.world.size)
        self.world.barrier()  # heartbeats begin here
        try:
            with Interruption() as interruption, self.monitor, self.watchdog:
                self._print(*self._description())
                if trainer.step == 0:
                    if self._teacher_accuracy is not None:
                        self._print(f"step 0  knn  teacher {self._teacher_accuracy:.3f}")
                    self._measure()
                prepare_process(trainer.device)
                self.meter.restart()
                self.monitor.restart()
                loop.train(
                    trainer,
                    self._batches(),
                    events,
                    interruption,
                    self.monitor,
                    self._save_and_stop,
                    self._stop_requested,
                )
                self._print(f"pretrained {', '.join(trainer.model.family.names)} in {self.out}")
                self._judge()
        finally:
            if self.log is not None:
                self.log.close()

    def _in_steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.trainer.epoch_steps)) if epochs > 0 else 0

    def _batches(self) -> Iterator[Tensor]:
        """The batches. An unreadable image too many ends the run, after saving."""
        at, trainer = self.watchdog.at, self.trainer
        try:
            at(trainer.step, "waiting for images")
            for batch in self.meter.batches():
                self._report_bad()
                at(trainer.step, "training")
                self._batch = batch
                yield batch
                at(trainer.step, "waiting for images")
        except InputError:
            self._report_bad()
            self._save_and_stop(this_rank=True)
            raise

    def _estimate(self, losses: dict[str, Tensor]) -> None:
        """Print the estimated duration of the run after a few steps."""
        line = None if self._duration is None else self._duration.after_step(self.trainer.step, losses)
        if line is not None:
            self._print(line)

    def _check_skipped(self, losses: dict[str, Tensor]) -> None:
        """Report skipped steps; end the run after too many in a row."""
        trainer = self.trainer
        if not (trainer.step == trainer.steps or self._may_sync):
            return
        skipped = trainer.guard.skipped()
        if skipped.total > self._skipped:
            self._skipped = skipped.total
            step = trainer.step - skipped.since
            self._print(f"step {step}  skipped: its numbers were not finite ({skipped.total} steps so far)")
        if skipped.longest_row >= trainer.max_skipped:
            self._record(losses)
            self._give_up()

    def _record(self, losses: dict[str, Tensor]) -> None:
        """Log the losses and the throughput."""
        trainer, config = self.trainer, self.config
        rate, waiting = self.meter.read()
        figures = torch.stack([*losses.values(), torch.tensor(rate, device=trainer.device)])
        self.world.all_reduce_mean(figures)
        *averaged, rate = figures.tolist()
        rate *= self.world.size
        steps = int(SYNC_SECONDS * rate / config.batch_size)
        self._sync_steps = max(1, min(config.log_steps, steps))  # the same on all ranks
        if self.log is None:
            return
        values = dict(zip(losses, averaged, strict=True))
        self.log.metrics(
            trainer.step,
            {
                "epoch": trainer.step / trainer.epoch_steps,
                "loss": values,
                "learning_rate": trainer.learning_rate(trainer.step - 1),
                "tau": trainer.tau(trainer.step - 1),
                "images_per_second": rate,
                "data_wait": waiting,
                "bad_images": len(self.bad),
                "skipped_steps": self._skipped,
            },
        )
        shown = "  ".join(f"{name} {values[name]:.3f}" for name in trainer.model.family.names if name in values)
        bad = f"  bad images {len(self.bad)}" if len(self.bad) else ""
        self.monitor.status(f"loss {shown}  {rate:.0f} img/s  data wait {waiting:.0%}{bad}")

    @cached_property
    def _teacher_accuracy(self) -> float | None:
        """The teacher's kNN accuracy on the probe's images, at the teacher's size if its features are on disk."""
        if self.probe is None or self._test is None or self.teacher is None:
            return None
        self.watchdog.at(self.trainer.step, "measuring")
        config, probe = self.config, self.probe
        if config.teacher_cache is not None:
            size = self.teacher.facts.image_size
            probe = Probe(self.images, self._test, config.probe_images, size, self.trainer.device, self.bad)
        return probe.accuracy(self.teacher.features)

    def _measure(self, losses: dict[str, Tensor] | None = None) -> None:
        """Measure kNN accuracy, feature std and rank of every subnet, and warn of collapse."""
        if self.probe is None or self.log is None:
            return
        step, model = self.trainer.step, self.trainer.model
        self.watchdog.at(step, "measuring")
        with self.meter.paused():
            values = self.probe.measure(model.online.encoder, model.family)
        self.log.metrics(step, values)
        for kind, by_subnet in values.items():
            self._print(
                f"step {step}  {kind}  " + "  ".join(f"{name} {value:.3f}" for name, value in by_subnet.items())
            )
        std, rank = values["feature_std"], values["effective_rank"]
        fallen = [name for name in std if collapsed(std[name], rank[name])]
        if fallen and step:
            self._print(
                f"step {step}  COLLAPSE of {', '.join(fallen)}: feature std below {MIN_STD:g} or effective rank "
                f"below {MIN_RANK:g}, so their features no longer tell images apart; {ADVICE}"
            )

    def _judge(self) -> None:
        """Compare the networks with untrained ones and raw pixels, print it and write OUT/verdict.json."""
        if self.probe is None or self.log is None:
            return
        metrics = read_metrics(self.out)
        verdict = verdict_of(metrics, self.probe, self.config.init_from is not None, self._teacher_accuracy)
        if verdict is None:
            return
        self._print(*(f"verdict  {line}" for line in verdict.lines))
        contents = {"step": self.trainer.step, **verdict.to_json()}
        atomic.write_text(self.out / VERDICT, json.dumps(contents, indent=1) + "\n")

    def _save(self, losses: dict[str, Tensor] | None = None, this_rank: bool = False) -> None:
        """Write a checkpoint on rank 0 (`this_rank`: here), and merge the ranks' bad images."""
        config, trainer, writes = self.config, self.trainer, self.world.is_main or this_rank
        self.watchdog.at(trainer.step, "writing a checkpoint" if writes else "waiting for a checkpoint")
        with self.meter.paused():
            if self.log is not None:
                self.log.sync()
            if writes:
                keep_every = round(config.keep_epochs * trainer.epoch_steps)
                checkpoint.save(self.checkpoints, trainer.step, trainer.state(), config.keep_checkpoints, keep_every)
            if self.world.size > 1 and losses is not None:
                for found in self.world.all_gather(self.bad.found):
                    self.bad.add(list(found.items()))
                self._report_bad()

    @property
    def _may_sync(self) -> bool:
        """Whether the device may be asked for a result. On a GPU that synchronises, so only every few seconds."""
        return self.trainer.device.type == "cpu" or self.trainer.step % self._sync_steps == 0

    def _stop_requested(self, here: bool) -> bool:
        """Whether any rank was asked to stop."""
        if self.world.size == 1:
            return here
        return self._may_sync and self.world.any(here, self.trainer.device)

    def _save_and_stop(self, this_rank: bool = False) -> None:
        self._save(this_rank=this_rank)
        self._print(
            f"stopped and saved after step {self.trainer.step} of {self.trainer.steps}; continue with",
            f"  dspnet-pretrain --out {self.out} --resume",
        )

    def _give_up(self) -> NoReturn:
        """Save, name the first non-finite number and the images of its batch, and end the run."""
        self._save()
        assert self._batch is not None
        since = self.trainer.guard.skipped().since
        step = self.trainer.step - since
        finding = self.trainer.diagnose(self._batch) if since == 0 else None  # the batch of an earlier step is gone
        batch = [self.images.file(index) for _, index in next(iter(self._sampler(step - 1, self.trainer.steps)))]
        by_rank = self.world.all_gather((finding, batch))
        report = self.out / "nonfinite.json"
        if self.world.is_main:
            ranks = [{"found": found and found._asdict(), "batch": files} for found, files in by_rank]
            atomic.write_text(report, json.dumps({"step": step, "ranks": ranks}, indent=1) + "\n")
        first = next((f", first in {found} of rank {rank}" for rank, (found, _) in enumerate(by_rank) if found), "")
        advice = ADVICE + (", or store activations with --precision fp32" if self.config.precision != "fp32" else "")
        if any(found and found.subnet == "teacher" for found, _ in by_rank):
            advice = "or choose another --teacher"
        raise InputError(
            f"{self.trainer.max_skipped} consecutive steps had numbers that are not finite{first}; saved after step "
            f"{self.trainer.step}. {report} lists their images: check these, {advice}"
        )

    def _print(self, *lines: str) -> None:
        """Print and log lines, on rank 0."""
        if self.log is None:
            return
        for line in lines:
            self.monitor.line(line)
            self.log.line(line)

    def _print_anywhere(self, line: str) -> None:
        """Print a line from any rank and thread."""
        if self.log is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._print(line)

    def _report_bad(self) -> None:
        """Print new bad images and update their list."""
        news = self.bad.new_messages()
        if news and self.world.is_main:
            self._print(*news)
            write_bad_images(self.out, self.bad.found, self.config.data)

    def _description(self) -> list[str]:
        trainer, config = self.trainer, self.config
        serving = registry.serving(trainer.device.type).items()
        operators = ", ".join(f"{operator}: {provider}" for operator, provider in serving)
        return [
            f"{config.network} {', '.join(trainer.model.family.names)} on {len(self.images)} images of {config.data}, "
            f"{config.epochs} epochs of {trainer.epoch_steps} steps, {config.precision} on {trainer.device}, "
            f"data by {config.data_backend}" + (f", {self.world.size} ranks" if self.world.size > 1 else ""),
            f"pixels  {self.format.describe()}",
            f"data  {self._data_used.line()}",
            *([f"data  {self._data_change}"] if self._data_change else []),
            *recipe.lines(self._choices, len(self.images)),
            *([] if self.teacher is None else self.teacher.description()),
            *([self.kernels.line()] if self.kernels else []),
            *([] if registry.is_eager() else [f"operators  {operators}"]),
            *([f"resumed at step {trainer.step}"] if trainer.step else []),
            *([f"{self._raised}; learning rate {trainer.learning_rate(trainer.step):.4g}"] if self._raised else []),
        ]
