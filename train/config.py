"""Options of pretraining and fine-tuning. YAML keys, command-line options and dataclass fields have the same names."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from dspnet_fast.errors import InputError
from dspnet_fast.models import FORMS, NETWORKS, STEMS, check_network

from .run.options import (
    DEVICE_HELP,
    DEVICES,
    FAST_KERNELS_HELP,
    LOG_TO_HELP,
    PLUGINS_HELP,
    WORKERS_HELP,
    Workers,
    flag,
    option,
    positive,
    two_images,
)

BACKENDS = ("torchvision", "dali-cpu", "dali-gpu")  # implementations of the augmentation

EIGHT_BIT = "8bit"  # value of --pixel-range for images that are read as 8-bit grey or RGB
SCRATCH = "none"  # value of --from for random weights


# The paper's values of the options that --recipe chooses; inferred ones are marked in docs/algorithm.md.
PAPER = {
    "epochs": 300,
    "batch_size": 256,
    "base_lr": 0.2,
    "warmup_epochs": 10.0,
    "weight_decay": 1.5e-6,
    "tau": 0.996,
    "min_scale": 0.08,
}
# Values of AdamW instead.
ADAMW = {"base_lr": 1e-3, "weight_decay": 0.05}
OPTIMIZERS = ("lars", "adamw")
RECIPES = ("auto", "paper")


@dataclass(kw_only=True)
class DataOptions:
    """data"""

    data: str = option(
        "fashion-mnist",
        "fashion-mnist, cifar10, an image folder, or WebDataset shards such as 'DIR/{000..015}.tar'",
        metavar="IMAGES",
    )
    data_backend: str = option(
        "auto",
        f"image decoding and augmentation: auto, {', '.join(BACKENDS)}; see docs/data.md",
        metavar="BACKEND",
    )
    unlabelled: bool = option(False, "take the images of all subfolders, which are no classes")
    image_size: int = option(96, "height and width of the augmented views, in pixels")
    min_scale: float = option(None, "smallest area of a random crop, as a fraction of the image [by --recipe]")
    train_images: int | None = option(None, "number of training images, drawn at random [all]")
    workers: Workers = option("auto", WORKERS_HELP, True)
    max_bad_images: int | None = option(
        None, "number of unreadable images to skip before the run ends [1 in 1,000]", True
    )


@dataclass(kw_only=True)
class AugmentationOptions:
    """augmentation"""

    flip_probability: float = option(0.5, "fraction of views that are mirrored left to right")
    jitter_probability: float = option(0.8, "fraction of views whose brightness, contrast, saturation and hue change")
    brightness: float = option(0.4, "largest deviation of the brightness factor from 1")
    contrast: float = option(0.4, "largest deviation of the contrast factor from 1")
    saturation: float = option(0.2, "largest deviation of the saturation factor from 1; 3 channels only")
    hue: float = option(0.1, "largest shift of the hue, at most 0.5; 3 channels only")
    grey_probability: float = option(0.2, "fraction of views that become greyscale; 3 channels only")
    blur_probability: str = option("1.0,0.1", "fractions of first and second views that are blurred", metavar="P,P")
    blur_sigma: str = option(
        "0.1,2.0", "smallest and largest sigma in pixels of views of 224, scaled to --image-size", metavar="MIN,MAX"
    )
    solarize_probability: str = option(
        "0.0,0.2", "fractions of first and second views that are solarised", metavar="P,P"
    )
    solarize_threshold: int = option(128, "value from 0 to 255 from which on solarisation inverts")

    def pair(self, name: str) -> tuple[float, float]:
        """The two numbers of an option."""
        first, second = _finite_numbers(flag(name), getattr(self, name), 2)
        return first, second

    def check_augmentation(self) -> None:
        """Raise InputError for invalid values."""
        for name in (
            "flip_probability",
            "jitter_probability",
            "grey_probability",
            "brightness",
            "contrast",
            "saturation",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{flag(name)} must lie between 0 and 1, not at {getattr(self, name)}")
        for name in ("blur_probability", "solarize_probability"):
            if not all(0 <= probability <= 1 for probability in self.pair(name)):
                raise InputError(f"{flag(name)} must be two numbers between 0 and 1, not {getattr(self, name)}")
        if not 0 < self.pair("blur_sigma")[0] <= self.pair("blur_sigma")[1]:
            raise InputError(f"--blur-sigma must be two numbers above 0, the smaller first, not {self.blur_sigma}")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"--hue must lie between 0 and 0.5, not at {self.hue}")
        if not 0 <= self.solarize_threshold <= 255:
            raise InputError(f"--solarize-threshold must lie between 0 and 255, not at {self.solarize_threshold}")


@dataclass(kw_only=True)
class PixelOptions:
    """pixels"""

    channels: int | Literal["auto"] = option(
        "auto", "channels of an image; a number takes the first N; auto: as stored, 3 for 8-bit images"
    )
    pixel_range: str = option(
        "auto",
        "values that become 0 and 1: MIN,MAX; percentile, the 0.1th and 99.9th of a sample; 8bit; or auto, which is "
        "8bit for such images, and for others chosen from a sample; see docs/pixels.md",
        metavar="RANGE",
    )
    normalization: str = option(
        "auto",
        "mean and std: imagenet; measure; or MEANS;STDS of the values from 0 to 1, such as '0.3;0.1'; auto: imagenet "
        "for 8bit, else measure",
        metavar="M;S",
    )

    @property
    def in_channels(self) -> int:
        """Channels of the networks' images; 3 before "auto" is resolved."""
        return 3 if self.channels == "auto" else self.channels

    def pixel_options(self) -> dict[str, Any]:
        """The values of these options, to copy them to another configuration."""
        return {f.name: getattr(self, f.name) for f in fields(PixelOptions)}

    def check_pixels(self) -> None:
        """Raise InputError for invalid values."""
        if self.channels != "auto" and self.channels < 1:
            raise InputError(f"--channels {self.channels}: give auto or at least 1")
        if self.pixel_range not in ("auto", "percentile", EIGHT_BIT):
            low, high = _finite_numbers("--pixel-range", self.pixel_range, 2)
            if low >= high:
                raise InputError(f"--pixel-range {self.pixel_range}: give the smaller value first")
        if self.normalization not in ("auto", "imagenet", "measure"):
            mean, _, std = self.normalization.partition(";")
            count = len(_finite_numbers("--normalization", mean))
            if min(_finite_numbers("--normalization", std, count)) <= 0:
                raise InputError(f"--normalization {self.normalization}: standard deviations must be above 0")


def _finite_numbers(flag: str, text: str, count: int | None = None) -> list[float]:
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} {text!r}: give numbers separated by commas; see --help") from error
    if not all(map(math.isfinite, found)) or len(found) != (count or len(found)):
        raise InputError(f"{flag} {text!r}: give {count or 'finite'} numbers")
    return found


@dataclass(kw_only=True)
class FamilyOptions(PixelOptions):
    """family"""

    network: str = option("mobilenet_v3_large", f"architecture: {', '.join(NETWORKS)}, {FORMS}", metavar="NAME")
    dns: str = option(
        "w0.50,w0.625,w0.75,w0.875,w1.00",
        "desired networks, such as w0.50,w1.00 or c64-d2222,c64-d3463",
        metavar="NAMES",
    )
    stem: str = option("standard", "standard; or small, without downsampling, for images below 64 px", metavar="STEM")
    hidden_features: int = option(4096, "hidden features of projector and predictor")
    out_features: int = option(256, "output features of projector and predictor")
    momentum_bn: str = option(
        "on",
        "momentum batch norm in the target: on, off, or momentum2, the variant of its published code",
        metavar="MODE",
    )
    init_from: str | None = option(
        None,
        "initial weights: a run directory, or published ones: timm:NAME, torchvision:NAME, or timm:NAME=FILE",
        metavar="SOURCE",
    )

    def names(self) -> list[str]:
        """The desired networks' names."""
        return [name.strip() for name in self.dns.split(",") if name.strip()]


@dataclass(kw_only=True)
class TeacherOptions:
    """teacher"""

    teacher: str | None = option(
        None,
        "frozen network whose features the subnets learn to predict: efficientnet-lite0, a run, RUN:DN, an export, "
        "timm:NAME[=FILE], torchvision:NAME[=FILE] or module:function; see docs/teacher.md",
        True,
        "SOURCE",
    )
    teacher_size: int | None = option(
        None, "height and width of the teacher's images, in pixels [its own, at most twice --image-size]"
    )
    teacher_features: int | None = option(None, "number of features, another one is an error [the teacher's]")
    teacher_target: str = option(
        "centred",
        "centred: the teacher's features without their mean; whitened: also decorrelated, with equal variances",
        metavar="KIND",
    )
    self_weight: float = option(0.0, "with a teacher, weight of the loss against the moving-average target, 0 to 1")
    teacher_cache: str | None = option(
        None,
        "folder for the teacher's features of every image and of its mirror image, which replace those of the views",
        metavar="DIR",
    )


@dataclass(kw_only=True)
class OptimizationOptions:
    """optimization"""

    recipe: str = option(
        "auto",
        "values of options that are not given: auto, for the number of images; or paper; see docs/recipes.md",
        metavar="NAME",
    )
    optimizer: str = option("lars", f"optimizer: {', '.join(OPTIMIZERS)}", metavar="NAME")
    epochs: int = option(None, "passes over the images [by --recipe]")
    batch_size: int = option(None, "images per step, over all ranks [by --recipe]")
    bn_groups: int | None = option(None, "ghost batch norm groups of a batch [one per micro-batch and rank]")
    subnets_per_step: int = option(4, "subnets per step: the smallest, the full one, and random others")
    base_lr: float = option(None, "learning rate per 256 images: the peak is base_lr * batch_size / 256 [by --recipe]")
    warmup_epochs: float = option(None, "epochs of linear learning rate warm-up [by --recipe]")
    full_only_epochs: float | None = option(None, "initial epochs that train the full network alone [--warmup-epochs]")
    weight_decay: float = option(None, "weight decay of tensors with two or more dimensions [by --recipe]")
    weight_decay_end: float | None = option(
        None, "weight decay at the end; it follows a cosine from --weight-decay [--weight-decay]"
    )
    momentum: float = option(0.9, "momentum of LARS; beta1 of AdamW")
    beta2: float = option(0.999, "decay rate of AdamW's average of squared gradients")
    eta: float = option(1e-3, "LARS trust coefficient")
    tau: float = option(None, "initial decay rate of the target; rises to 1 [by --recipe]")
    seed: int = option(0, "seed of weights, order, augmentation and sampling")
    precision: str = option(
        "fp32", "fp32; or bf16 or fp16, the dtype of activations, convolutions and products", metavar="DTYPE"
    )
    tf32: bool = option(False, "compute fp32 convolutions and products of a GPU in TF32, with 10 bits of mantissa")

    def full_only_steps(self, epoch_steps: int) -> int:
        """Number of initial steps that train the full network alone."""
        return round((self.warmup_epochs if self.full_only_epochs is None else self.full_only_epochs) * epoch_steps)


@dataclass(kw_only=True)
class ExecutionOptions:
    """execution"""

    device: str = option("auto", DEVICE_HELP, True, "DEVICE")
    fast_kernels: bool = option(False, FAST_KERNELS_HELP, changeable=True)
    plugins: str = option("", PLUGINS_HELP, True, "MODULES")
    grad_accum_steps: int = option(1, "micro-batches per optimizer step", True)
    overlap_all_reduce: bool = option(
        False, "all-reduce gradients of late layers during the backward pass of early ones", True
    )
    cudnn: str = option(
        "deterministic",
        "choice of convolution algorithms on a GPU: deterministic, default, or benchmark, which times several and may "
        "choose differently in every run",
        True,
        "MODE",
    )
    no_cuda_graphs: bool = option(False, "launch kernels one by one instead of replaying CUDA graphs", changeable=True)
    probe_epochs: float = option(1.0, "epochs between measurements of kNN accuracy and feature std; 0: never", True)
    probe_images: int = option(2000, "reference images for kNN; half as many are classified", changeable=True)
    checkpoint_epochs: float = option(1.0, "epochs between checkpoints", changeable=True)
    keep_checkpoints: int = option(
        2, "number of checkpoints to keep; an older one is loaded if the newest is damaged", True
    )
    keep_epochs: float = option(0.0, "epochs between checkpoints that are never deleted; 0: none", changeable=True)
    stall_timeout: float = option(300.0, "seconds without a step before a stall is reported; 0: never", True)
    log_steps: int = option(10, "steps between log entries", changeable=True)
    log_to: str = option("tensorboard", LOG_TO_HELP, True, "NAMES")


@dataclass(kw_only=True)
class RunConfig:
    """run directory"""

    command: ClassVar[str]  # the command that creates such runs

    out: str = option("", "run directory for configuration, metrics, checkpoints and results", True, "DIR")

    def differences(self, other: RunConfig) -> list[str]:
        """Names of the options that differ in a resumed run, `other`, and may not. `epochs` may be raised."""
        return [
            f.name
            for f in fields(self)
            if not f.metadata["changeable"]
            and getattr(self, f.name) != getattr(other, f.name)
            and not (f.name == "epochs" and self.is_raised_by(other))
        ]

    def is_raised_by(self, other: RunConfig) -> bool:
        """Whether a resumed run, `other`, has more epochs."""
        return bool(vars(self)["epochs"] < vars(other)["epochs"])


@dataclass(kw_only=True)
class PretrainConfig(
    RunConfig, ExecutionOptions, OptimizationOptions, TeacherOptions, FamilyOptions, AugmentationOptions, DataOptions
):
    """Configuration of `train.pretrain`. Options that are None are chosen when the run starts (docs/recipes.md)."""

    command = "dspnet-pretrain"

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        choices = {
            "data_backend": ("auto", *BACKENDS),
            "stem": STEMS,
            "momentum_bn": ("on", "off", "momentum2"),
            "teacher_target": ("centred", "whitened"),
            "precision": ("fp32", "bf16", "fp16"),
            "device": DEVICES,
            "recipe": RECIPES,
            "optimizer": OPTIMIZERS,
            "cudnn": ("deterministic", "default", "benchmark"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{flag(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        check_network(self.network)
        if self.recipe == "paper":
            for name, value in (PAPER | (ADAMW if self.optimizer == "adamw" else {})).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.batch_size is not None:
            two_images(self.batch_size)
        sizes = (
            "image_size hidden_features out_features epochs log_steps probe_images grad_accum_steps keep_checkpoints"
        )
        for name in sizes.split():
            if given.get(name, 1) < 1:
                raise InputError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in (
            "warmup_epochs",
            "probe_epochs",
            "checkpoint_epochs",
            "keep_epochs",
            "stall_timeout",
            "base_lr",
            "weight_decay",
            "weight_decay_end",
            "seed",
        ):
            if given.get(name, 0) < 0:
                raise InputError(f"{flag(name)} cannot be negative: {getattr(self, name)}")
        for name in ("tau", "momentum", "beta2", "min_scale", "self_weight"):
            if not 0 <= given.get(name, 0) <= 1:
                raise InputError(f"{flag(name)} must lie between 0 and 1, not at {getattr(self, name)}")
        if self.bn_groups is not None and (self.bn_groups < 1 or given.get("batch_size", 0) % self.bn_groups):
            raise InputError(
                f"--batch-size {self.batch_size} cannot be divided into {self.bn_groups} equal groups: see --bn-groups"
            )
        for name in ("teacher_size", "teacher_features"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.teacher is None:
            for name in ("teacher_size", "teacher_features", "self_weight", "teacher_cache"):
                if getattr(self, name):
                    raise InputError(f"{flag(name)} needs --teacher: name the network to learn from")
        if self.max_bad_images is not None and self.max_bad_images < 0:
            raise InputError(f"--max-bad-images cannot be negative: {self.max_bad_images}")
        self.check_pixels()
        self.check_augmentation()
        if not self.names():
            raise InputError("--dns names no network: give for example --dns w0.50,w0.75,w1.00")


@dataclass(kw_only=True)
class StartOptions:
    """start"""

    from_: str = option("", "run directory of dspnet-pretrain to start from; none: random weights", metavar="DIR")
    dn: str | None = option(None, "network of the run to train alone", metavar="NAME")
    dns: str | None = option(None, "subnets to train jointly (switches) [the run's networks]", metavar="NAMES")
    network: str | None = option(None, f"architecture with --from none: {', '.join(NETWORKS)}, {FORMS}", metavar="NAME")
    stem: str | None = option(None, f"stem with --from none: {', '.join(STEMS)} [standard]", metavar="STEM")


@dataclass(kw_only=True)
class LabelledOptions:
    """data"""

    data: str | None = option(None, "labelled images [those of the pretraining run]", metavar="IMAGES")
    image_size: int | None = option(None, "height and width of the views, in pixels [the pretraining run's]")
    min_scale: float = option(0.08, "smallest area of a random crop, as a fraction of the image")
    workers: Workers = option("auto", WORKERS_HELP, True)


@dataclass(kw_only=True)
class SupervisedOptions:
    """optimization"""

    epochs: int = option(300, "passes over the images")
    batch_size: int = option(256, "images per step")
    lr: float = option(0.1, "learning rate per 256 images: the peak is lr * batch_size / 256")
    head_lr: float | None = option(None, "learning rate of the classifier per 256 images [--lr]")
    momentum: float = option(0.9, "SGD momentum")
    weight_decay: float = option(4e-5, "weight decay of tensors with two or more dimensions")
    warmup_epochs: float = option(5.0, "epochs of linear learning rate warm-up")
    label_smoothing: float = option(0.1, "label smoothing")
    subnets_per_step: int = option(4, "subnets per step: the smallest, the full one, and random others")
    no_distillation: bool = option(
        False, "train every subnet on the labels instead of on the full network's predictions"
    )
    seed: int = option(0, "seed of weights, order, augmentation and sampling")


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig, SupervisedOptions, PixelOptions, LabelledOptions, StartOptions):
    """Configuration of `train.finetune`."""

    command = "dspnet-finetune"

    evaluate_epochs: int = option(10, "epochs between evaluations on the test images; 0: only at the end", True)
    stall_timeout: float = option(300.0, "seconds without a step before a stall is reported; 0: never", True)
    device: str = option("auto", DEVICE_HELP, True, "DEVICE")
    fast_kernels: bool = option(False, FAST_KERNELS_HELP, True)
    plugins: str = option("", PLUGINS_HELP, True, "MODULES")
    log_to: str = option("tensorboard", LOG_TO_HELP, True, "NAMES")

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        positive(epochs=self.epochs, lr=self.lr)
        two_images(self.batch_size)
        positive(head_lr=self.lr if self.head_lr is None else self.head_lr)
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{flag(name)} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "evaluate_epochs", "stall_timeout"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} cannot be negative: {getattr(self, name)}")
        self.check_pixels()
        if not self.from_:
            raise InputError(
                "--from is missing: name a run directory of dspnet-pretrain, or none to start from scratch"
            )
        if self.dn is not None and (self.dns is not None or self.from_ == SCRATCH):
            raise InputError("--dn needs --from RUN, and excludes --dns: it trains one network of a run alone")

    def family(self) -> FamilyOptions:
        """The family of subnets to train; the configuration must be completed."""
        assert self.network is not None and self.dns is not None and self.stem is not None
        return FamilyOptions(network=self.network, dns=self.dns, stem=self.stem, **self.pixel_options())
