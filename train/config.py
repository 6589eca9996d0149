"""Options of pretraining and fine-tuning. YAML keys, command-line options and dataclass fields have the same names."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from dspnet_fast.errors import InputError
from dspnet_fast.models import NETWORKS, STEMS

from .called import as_called

BACKENDS = ("torchvision", "dali-cpu", "dali-gpu")  # implementations of the augmentation

Workers = int | Literal["auto"]  # image loading processes
MAX_WORKERS = 8  # of "auto"
SMALL_SET = 256  # images up to which "auto" starts no workers: starting them would take longer
WORKERS_HELP = (
    f"image loading processes; 0 loads in the main process; auto: one per core, at most {MAX_WORKERS}, and 0 for sets "
    f"of up to {SMALL_SET} images"
)
SCRATCH = "none"  # --from: random weights


def option(default: Any, help: str, changeable: bool = False) -> Any:
    """A field with its help text; `changeable` ones may differ when a run is resumed."""
    return field(default=default, metadata={"help": help, "changeable": changeable})


@dataclass(kw_only=True)
class DataOptions:
    """data"""

    data: str = option("fashion-mnist", "fashion-mnist, cifar10, a folder of images, or shards: 'DIR/{000..015}.tar'")
    data_backend: str = option("auto", f"who decodes and augments: auto, {', '.join(BACKENDS)}; see docs/data.md")
    image_size: int = option(96, "height and width of the augmented views, in pixels")
    min_scale: float = option(0.08, "smallest share of the image's area that a random crop takes")
    train_images: int | None = option(None, "use only this many images, drawn at random")
    workers: Workers = option("auto", WORKERS_HELP, True)
    max_bad_images: int | None = option(None, "unreadable images that a run may leave out [1 in 1,000 of all]", True)


@dataclass(kw_only=True)
class FamilyOptions:
    """family"""

    network: str = option("mobilenet_v3_large", f"architecture: {', '.join(NETWORKS)}")
    dns: str = option("w0.50,w0.625,w0.75,w0.875,w1.00", "desired networks, such as w0.50,w1.00 or c64-d2222,c64-d3463")
    stem: str = option("standard", "standard, or small: keeps the resolution, for images below about 64 px")
    hidden_features: int = option(4096, "hidden features of projector and predictor")
    out_features: int = option(256, "output features of projector and predictor")
    momentum_bn: str = option("on", "momentum batch norm in the target: on, off, momentum2 (as the published code)")
    init_from: str | None = option(None, "start from the weights of the newest checkpoint of this run directory")

    def names(self) -> list[str]:
        """The desired networks' names."""
        return [name.strip() for name in self.dns.split(",") if name.strip()]


@dataclass(kw_only=True)
class OptimizationOptions:
    """optimization"""

    epochs: int = option(300, "passes over the images")
    batch_size: int = option(256, "images per step, of all ranks together")
    bn_groups: int | None = option(None, "parts of a batch that are normalised by themselves [each turn of each rank]")
    subnets_per_step: int = option(4, "subnets per step: smallest, full, and random ones between")
    base_lr: float = option(0.2, "learning rate for 256 images; the peak is base_lr * batch_size / 256")
    warmup_epochs: float = option(10.0, "epochs of linear learning rate warm-up")
    full_only_epochs: float | None = option(None, "epochs at the start that train only the full network [the warm-up]")
    weight_decay: float = option(1.5e-6, "weight decay of tensors with more than one dimension")
    momentum: float = option(0.9, "LARS momentum")
    eta: float = option(1e-3, "LARS trust coefficient")
    tau: float = option(0.996, "decay of the target at the start; rises to 1")
    seed: int = option(0, "seed of weights, order, augmentation and sampling")
    precision: str = option("fp32", "fp32, or bf16 to store activations in bf16")

    def full_only_steps(self, epoch_steps: int) -> int:
        """Steps at the start that train only the full network, of a run with so many steps in an epoch."""
        return round((self.warmup_epochs if self.full_only_epochs is None else self.full_only_epochs) * epoch_steps)


@dataclass(kw_only=True)
class ExecutionOptions:
    """execution"""

    device: str = option("auto", "auto, cpu or cuda", changeable=True)
    fast_kernels: bool = option(False, "use the fastest operator provider this machine has", changeable=True)
    grad_accum_steps: int = option(1, "turns in which a rank takes its share of a batch that is too large for it", True)
    overlap_all_reduce: bool = option(
        False, "exchange gradients of late layers while those of early ones are computed", True
    )
    no_cuda_graphs: bool = option(False, "launch every kernel by itself instead of replaying graphs", changeable=True)
    probe_epochs: float = option(1.0, "epochs between measurements of kNN and feature spread; 0 for none", True)
    probe_images: int = option(2000, "reference images of that kNN; half as many are classified", changeable=True)
    checkpoint_epochs: float = option(1.0, "epochs between checkpoints", changeable=True)
    keep_checkpoints: int = option(2, "newest checkpoints to keep; the older are for when the newest is damaged", True)
    keep_epochs: float = option(0.0, "also keep those of every so many epochs; 0 for none", changeable=True)
    stall_timeout: float = option(
        300.0, "seconds without a step after which the run says what it waits for; 0: never", True
    )
    log_steps: int = option(10, "steps between lines of metrics", changeable=True)


@dataclass(kw_only=True)
class RunConfig:
    """run directory"""

    command: ClassVar[str]  # whose runs these are

    out: str = option("", "folder for configuration, metrics, checkpoints and results", changeable=True)

    def differences(self, other: RunConfig) -> list[str]:
        """Names of the options that differ and would make a resumed run another one."""
        return [
            f.name
            for f in fields(self)
            if not f.metadata["changeable"] and getattr(self, f.name) != getattr(other, f.name)
        ]


@dataclass(kw_only=True)
class PretrainConfig(RunConfig, ExecutionOptions, OptimizationOptions, FamilyOptions, DataOptions):
    """Configuration of `train.pretrain`. Defaults are the paper's recipe where it states one (docs/algorithm.md)."""

    command = "train.pretrain"

    def __post_init__(self) -> None:
        """Raise InputError for values that no run can have."""
        choices = {
            "data_backend": ("auto", *BACKENDS),
            "network": tuple(NETWORKS),
            "stem": STEMS,
            "momentum_bn": ("on", "off", "momentum2"),
            "precision": ("fp32", "bf16"),
            "device": ("auto", "cpu", "cuda"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{flag(name)} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        sizes = (
            "image_size",
            "hidden_features",
            "out_features",
            "epochs",
            "batch_size",
            "log_steps",
            "probe_images",
            "grad_accum_steps",
            "keep_checkpoints",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in (
            "warmup_epochs",
            "probe_epochs",
            "checkpoint_epochs",
            "keep_epochs",
            "stall_timeout",
            "base_lr",
            "weight_decay",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} cannot be negative: {getattr(self, name)}")
        for name in ("tau", "momentum", "min_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{flag(name)} lies between 0 and 1, not at {getattr(self, name)}")
        if self.bn_groups is not None and (self.bn_groups < 1 or self.batch_size % self.bn_groups):
            raise InputError(f"--batch-size {self.batch_size} is not {self.bn_groups} equal parts: see --bn-groups")
        if self.max_bad_images is not None and self.max_bad_images < 0:
            raise InputError(f"--max-bad-images cannot be negative: {self.max_bad_images}")
        if not self.names():
            raise InputError("--dns names no network: give for example --dns w0.50,w0.75,w1.00")


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


def key(name: str) -> str:
    """The name of an option in YAML files: of a field that is a word of Python's, such as `from_`, without the _."""
    return name.rstrip("_")


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + key(name).replace("_", "-")


def positive(**values: float) -> None:
    """Raise InputError for an option that must be above 0 and is not."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{flag(name)} must be above 0, not {value}")
