"""Everything a supervised training can be told, and what it leaves to the run that it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from dspnet_fast.errors import InputError
from dspnet_fast.models import NETWORKS, STEMS

from .called import as_called
from .choices import WORKERS_HELP, Workers
from .config import FamilyOptions, RunConfig, flag, option, positive

SCRATCH = "none"


@dataclass(kw_only=True)
class StartOptions:
    """start"""

    from_: str = option("", "run directory of train.pretrain to start from, or none: random weights")
    dn: str | None = option(None, "train this network of the run alone")
    dns: str | None = option(None, "switches [the run's networks]")
    network: str | None = option(None, f"from none: architecture, {', '.join(NETWORKS)}")
    stem: str | None = option(None, f"from none: {', '.join(STEMS)} [standard]")


@dataclass(kw_only=True)
class LabelledOptions:
    """data"""

    data: str | None = option(None, "set of images with labels [the one that the run was pretrained on]")
    image_size: int | None = option(None, "height and width of the views, in pixels [the run's]")
    min_scale: float = option(0.08, "smallest share of the image's area that a random crop takes")
    workers: Workers = option("auto", WORKERS_HELP, True)


@dataclass(kw_only=True)
class SupervisedOptions:
    """optimization"""

    epochs: int = option(300, "passes over the images")
    batch_size: int = option(256, "images per step")
    lr: float = option(0.1, "learning rate for 256 images; the peak is lr * batch_size / 256, then a cosine to 0")
    head_lr: float | None = option(None, "that of the classifier [the same]")
    momentum: float = option(0.9, "SGD momentum")
    weight_decay: float = option(4e-5, "weight decay of tensors with more than one dimension")
    warmup_epochs: float = option(5.0, "epochs of linear learning rate warm-up")
    label_smoothing: float = option(0.1, "share of the label given to all classes alike")
    subnets_per_step: int = option(4, "switches per step: smallest, full, and random ones between")
    no_distillation: bool = option(False, "let every switch learn from the labels instead of from the full network")
    seed: int = option(0, "seed of weights, order, augmentation and sampling")


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig, SupervisedOptions, LabelledOptions, StartOptions):
    """Configuration of `train.finetune`."""

    command = "train.finetune"

    evaluate_epochs: int = option(10, "epochs between accuracies on the test images; 0 for the last one only", True)
    device: str = option("auto", "auto, cpu or cuda", True)
    fast_kernels: bool = option(False, "use the fastest operator provider this machine has", True)

    def __post_init__(self) -> None:
        """Raise InputError for values that no run can have."""
        positive(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        positive(head_lr=self.lr if self.head_lr is None else self.head_lr)
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{flag(name)} is 0 or more and below 1, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "evaluate_epochs"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} cannot be negative: {getattr(self, name)}")
        if not self.from_:
            raise InputError(
                f"--from is missing: name a run directory of {as_called('train.pretrain')}, "
                "or none to start from scratch"
            )
        if self.dn is not None and (self.dns is not None or self.from_ == SCRATCH):
            raise InputError("--dn trains one network of a run alone: give --from a run, and no --dns")

    def family(self) -> FamilyOptions:
        """The switches, of a completed configuration."""
        assert self.network is not None and self.dns is not None and self.stem is not None
        return FamilyOptions(network=self.network, dns=self.dns, stem=self.stem)
