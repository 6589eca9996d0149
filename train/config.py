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
    STALL_HELP,
    TWO_IMAGES,
    WORKERS_HELP,
    Rule,
    Workers,
    below_one,
    check_options,
    choice,
    count,
    flag,
    fraction,
    not_negative,
    option,
    positive,
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


@dataclass(kw_only=True)
class DataOptions:
    """data"""

    data: str = option(
        "fashion-mnist",
        "fashion-mnist, cifar10, an image folder (DIR/{train,test}/CLASS/* for labels and a test split), a list file, "
        "or WebDataset shards such as 'DIR/{000..015}.tar'; see docs/data.md",
        metavar="IMAGES",
    )
    data_backend: str = choice(
        "auto",
        ("auto", *BACKENDS),
        f"program that decodes and augments images: auto, {', '.join(BACKENDS)}; see docs/data.md",
        metavar="BACKEND",
    )
    unlabelled: bool = option(False, "use the images of a folder at any depth; subfolders are not classes")
    image_size: int = count(96, "height and width of the augmented views, in pixels")
    min_scale: float = fraction(None, "smallest area of a random crop, as a fraction of the image [by --recipe]")
    train_images: int | None = count(None, "number of training images, drawn at random [all]")
    workers: Workers = option("auto", WORKERS_HELP, True)
    max_bad_images: int | None = not_negative(
        None, "unreadable images that are skipped; one more ends the run [1 in 1,000]", True
    )


@dataclass(kw_only=True)
class AugmentationOptions:
    """augmentation"""

    flip_probability: float = fraction(0.5, "fraction of views that are mirrored left to right")
    jitter_probability: float = fraction(0.8, "fraction of views whose brightness, contrast, saturation and hue change")
    brightness: float = fraction(0.4, "largest deviation of the brightness factor from 1")
    contrast: float = fraction(0.4, "largest deviation of the contrast factor from 1")
    saturation: float = fraction(0.2, "largest deviation of the saturation factor from 1; 3 channels only")
    hue: float = option(
        0.1,
        "largest shift of the hue, as a fraction of the circle of hues; 3 channels only",
        rule=Rule("lie between 0 and 0.5", lambda value: 0 <= value <= 0.5),
    )
    grey_probability: float = fraction(0.2, "fraction of views that become greyscale; 3 channels only")
    blur_probability: str = option("1.0,0.1", "fractions of first and second views that are blurred", metavar="P,P")
    blur_sigma: str = option(
        "0.1,2.0",
        "smallest and largest sigma of the blur in a view of 224 pixels; scaled to --image-size",
        metavar="MIN,MAX",
    )
    solarize_probability: str = option(
        "0.0,0.2", "fractions of first and second views that are solarised", metavar="P,P"
    )
    solarize_threshold: int = option(
        128,
        "smallest pixel value, of 0 to 255, that solarisation inverts",
        rule=Rule("lie between 0 and 255", lambda value: 0 <= value <= 255),
    )

    def pair(self, name: str) -> tuple[float, float]:
        """The two numbers of an option."""
        first, second = _finite_numbers(flag(name), getattr(self, name), 2)
        return first, second

    def check_augmentation(self) -> None:
        """Raise InputError for invalid pairs of numbers."""
        for name in ("blur_probability", "solarize_probability"):
            if not all(0 <= probability <= 1 for probability in self.pair(name)):
                raise InputError(f"{flag(name)} must be two numbers between 0 and 1, not {getattr(self, name)}")
        if not 0 < self.pair("blur_sigma")[0] <= self.pair("blur_sigma")[1]:
            raise InputError(f"--blur-sigma must be two numbers above 0, the smaller first, not {self.blur_sigma}")


@dataclass(kw_only=True)
class PixelOptions:
    """pixels"""

    channels: int | Literal["auto"] = option(
        "auto", "channels to use: the first N; auto: 3 for 8-bit images, all channels of others"
    )
    pixel_range: str = option(
        "auto",
        "pixel values that become 0 and 1: MIN,MAX; 8bit: 0 and 255; percentile: the 0.1th and 99.9th of a sample; "
        "auto: 8bit for 8-bit images, chosen from a sample for others; see docs/pixels.md",
        metavar="RANGE",
    )
    normalization: str = option(
        "auto",
        "mean and std of the pixels after --pixel-range: imagenet; measure, on a sample; or MEANS;STDS, such as "
        "'0.3;0.1'; auto: imagenet for 8-bit images, measure for others",
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
            mean, separator, std = self.normalization.partition(";")
            if not separator:
                raise InputError(
                    f"--normalization {self.normalization}: give auto, imagenet, measure, or means;deviations, such as "
                    "'0.31;0.12'"
                )
            channels = len(_finite_numbers("--normalization", mean))
            if min(_finite_numbers("--normalization", std, channels)) <= 0:
                raise InputError(f"--normalization {self.normalization}: standard deviations must be above 0")
            if self.channels not in ("auto", channels):
                raise InputError(
                    f"--normalization {self.normalization}: give a mean and a deviation of each of the "
                    f"{self.channels} channels"
                )


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
        "networks of the family (desired networks) by size: w0.50 has half of the channels; c64-d2222, of a resnet, "
        "starts with 64 channels and has stages of 2, 2, 2 and 2 blocks; w0.50-d1122, of another network, has half of "
        "the channels and stages of 1, 1, 2 and 2 blocks",
        metavar="NAMES",
    )
    stem: str = choice(
        "standard", STEMS, "standard; or small, without downsampling, for images below 64 px", metavar="STEM"
    )
    hidden_features: int = count(4096, "hidden features of projector and predictor")
    out_features: int = count(256, "output features of projector and predictor")
    momentum_bn: str = choice(
        "on",
        ("on", "off", "momentum2"),
        "momentum batch norm (Momentum^2 Teacher) in the target: on; off; or momentum2, with the variance as in its "
        "published code",
        metavar="MODE",
    )
    init_from: str | None = option(
        None,
        "initial weights: those of a run directory; or published ones, timm:NAME[=FILE] or torchvision:NAME[=FILE]",
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
    teacher_size: int | None = count(
        None, "height and width of the teacher's images, in pixels [its own, at most twice --image-size]"
    )
    teacher_features: int | None = count(None, "features of the teacher; another number is an error [any]")
    teacher_target: str = choice(
        "centred",
        ("centred", "whitened"),
        "centred: the teacher's features without their mean; whitened: also decorrelated, with equal variances",
        metavar="KIND",
    )
    self_weight: float = fraction(
        0.0, "with a teacher, weight from 0 to 1 of BYOL's loss against the moving-average target"
    )
    local_weight: float = not_negative(
        0.0, "with a teacher, weight of the loss between the feature maps of subnets and teacher, position by position"
    )
    teacher_map_channels: int | None = count(
        None, "channels of the teacher's feature map; another number is an error [any]"
    )
    teacher_cache: str | None = option(
        None,
        "folder for the teacher's features of every image and of its mirror image, which replace those of the views; "
        "not with --local-weight",
        metavar="DIR",
    )


@dataclass(kw_only=True)
class OptimizationOptions:
    """optimization"""

    recipe: str = choice(
        "auto",
        ("auto", "paper"),
        "values of options that are not given: auto, chosen for the number of images; or paper, the paper's; see "
        "docs/recipes.md",
        metavar="NAME",
    )
    optimizer: str = choice(None, OPTIMIZERS, f"optimizer: {', '.join(OPTIMIZERS)} [by --recipe]", metavar="NAME")
    epochs: int = count(None, "passes over the images [by --recipe]")
    batch_size: int = option(None, "images per step, over all ranks [by --recipe]", rule=TWO_IMAGES)
    bn_groups: int | None = count(
        None, "ghost batch norm groups: parts of a batch that are normalised separately [one per micro-batch and rank]"
    )
    subnets_per_step: int = option(4, "subnets per step: the smallest, the full one, and random others")
    base_lr: float = not_negative(
        None, "learning rate per 256 images: the peak is base_lr * batch_size / 256 [by --recipe]"
    )
    warmup_epochs: float = not_negative(None, "epochs of linear learning rate warm-up [by --recipe]")
    full_only_epochs: float | None = not_negative(
        None, "initial epochs that train the full network alone [--warmup-epochs]"
    )
    weight_decay: float = not_negative(None, "weight decay of tensors with two or more dimensions [by --recipe]")
    weight_decay_end: float | None = not_negative(
        None, "weight decay at the end; it follows a cosine from --weight-decay [--weight-decay]"
    )
    momentum: float = fraction(0.9, "momentum of LARS; beta1 of AdamW")
    beta2: float = fraction(0.999, "decay rate of AdamW's average of squared gradients")
    eta: float = not_negative(1e-3, "LARS trust coefficient")
    tau: float = fraction(None, "initial decay rate of the target; rises to 1 [by --recipe]")
    seed: int = not_negative(0, "seed of weights, order, augmentation and sampling")
    precision: str = choice(
        "fp32",
        ("fp32", "bf16", "fp16"),
        "dtype of activations, convolutions and matrix products: fp32, bf16 or fp16; weights are fp32",
        metavar="DTYPE",
    )
    tf32: bool = option(
        False, "compute fp32 convolutions and matrix products of a GPU in TF32, with 10 bits of mantissa"
    )

    def full_only_steps(self, epoch_steps: int) -> int:
        """Number of initial steps that train the full network alone."""
        return round((self.warmup_epochs if self.full_only_epochs is None else self.full_only_epochs) * epoch_steps)


@dataclass(kw_only=True)
class ExecutionOptions:
    """execution"""

    device: str = choice("auto", DEVICES, DEVICE_HELP, True, "DEVICE")
    fast_kernels: bool = option(False, FAST_KERNELS_HELP, changeable=True)
    plugins: str = option("", PLUGINS_HELP, True, "MODULES")
    grad_accum_steps: int = count(1, "micro-batches per optimizer step; more need less memory", True)
    overlap_all_reduce: bool = option(
        False, "all-reduce gradients of late layers during the backward pass of early ones", True
    )
    cudnn: str = choice(
        "deterministic",
        ("deterministic", "default", "benchmark"),
        "choice of convolution algorithms on a GPU: deterministic, default, or benchmark, which times several and may "
        "choose differently in every run",
        True,
        "MODE",
    )
    no_cuda_graphs: bool = option(False, "launch kernels one by one instead of replaying CUDA graphs", changeable=True)
    probe_epochs: float = not_negative(
        1.0, "epochs between measurements of kNN accuracy, feature std and effective rank; 0: never", True
    )
    probe_images: int = count(2000, "reference images for kNN; half as many are classified", True)
    checkpoint_epochs: float = not_negative(1.0, "epochs between checkpoints; 0: only at the end", True)
    keep_checkpoints: int = count(
        2, "number of checkpoints to keep; an older one is loaded if the newest is damaged", True
    )
    keep_epochs: float = not_negative(0.0, "epochs between checkpoints that are never deleted; 0: none", True)
    stall_timeout: float = not_negative(300.0, STALL_HELP, True)
    log_steps: int = count(10, "steps between log entries", True)
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
    ExecutionOptions, OptimizationOptions, TeacherOptions, FamilyOptions, AugmentationOptions, DataOptions, RunConfig
):
    """Configuration of `train.pretrain`. Options that are None are chosen when the run starts (docs/recipes.md)."""

    command = "dspnet-pretrain"

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        check_options(self)
        check_network(self.network)
        if self.recipe == "paper":
            self.optimizer = self.optimizer or "lars"
            for name, value in (PAPER | (ADAMW if self.optimizer == "adamw" else {})).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.bn_groups is not None and (self.batch_size or 0) % self.bn_groups:
            raise InputError(
                f"--batch-size {self.batch_size} cannot be divided into {self.bn_groups} equal groups: see --bn-groups"
            )
        if self.teacher is None:
            for name in ("teacher_size", "teacher_features", "self_weight", "local_weight", "teacher_cache"):
                if getattr(self, name):
                    raise InputError(f"{flag(name)} needs --teacher: name the network to learn from")
        if self.local_weight and self.teacher_cache is not None:
            raise InputError(
                "--local-weight needs feature maps of the views, and --teacher-cache keeps pooled features of whole "
                "images: leave out one of them"
            )
        self.check_pixels()
        self.check_augmentation()
        if not self.names():
            raise InputError("--dns names no network: give for example --dns w0.50,w0.75,w1.00")


@dataclass(kw_only=True)
class StartOptions:
    """start"""

    from_: str = option(
        "",
        "run directory of dspnet-pretrain to start from; or none: random weights, which needs --network, --dns, --data "
        "and --image-size",
        metavar="DIR",
    )
    dn: str | None = option(None, "network of the run to train alone", metavar="NAME")
    dns: str | None = option(None, "subnets to train jointly [the networks of the run]", metavar="NAMES")
    network: str | None = option(None, f"architecture with --from none: {', '.join(NETWORKS)}, {FORMS}", metavar="NAME")
    stem: str | None = choice(None, STEMS, f"stem with --from none: {', '.join(STEMS)} [standard]", metavar="STEM")


@dataclass(kw_only=True)
class LabelledOptions:
    """data"""

    data: str | None = option(
        None, "labelled images, as for dspnet-pretrain [those of the pretraining run]", metavar="IMAGES"
    )
    image_size: int | None = count(None, "height and width of the views, in pixels [the pretraining run's]")
    min_scale: float = fraction(0.08, "smallest area of a random crop, as a fraction of the image")
    workers: Workers = option("auto", WORKERS_HELP, True)


@dataclass(kw_only=True)
class SupervisedOptions:
    """optimization"""

    epochs: int = count(300, "passes over the images")
    batch_size: int = option(256, "images per step", rule=TWO_IMAGES)
    lr: float = positive(0.1, "learning rate per 256 images: the peak is --lr * --batch-size / 256")
    head_lr: float | None = positive(None, "learning rate of the classifier per 256 images [--lr]")
    momentum: float = below_one(0.9, "SGD momentum")
    weight_decay: float = not_negative(4e-5, "weight decay of tensors with two or more dimensions")
    warmup_epochs: float = not_negative(5.0, "epochs of linear learning rate warm-up")
    label_smoothing: float = below_one(0.1, "share of the target probability that is spread over all classes")
    subnets_per_step: int = option(4, "subnets per step: the smallest, the full one, and random others")
    no_distillation: bool = option(
        False, "train every subnet on the labels instead of on the full network's predictions"
    )
    seed: int = option(0, "seed of weights, order, augmentation and sampling")


@dataclass(kw_only=True)
class FinetuneConfig(SupervisedOptions, PixelOptions, LabelledOptions, StartOptions, RunConfig):
    """Configuration of `train.finetune`."""

    command = "dspnet-finetune"

    evaluate_epochs: int = not_negative(10, "epochs between evaluations on the test images; 0: only at the end", True)
    stall_timeout: float = not_negative(300.0, STALL_HELP, True)
    device: str = choice("auto", DEVICES, DEVICE_HELP, True, "DEVICE")
    fast_kernels: bool = option(False, FAST_KERNELS_HELP, True)
    plugins: str = option("", PLUGINS_HELP, True, "MODULES")
    log_to: str = option("tensorboard", LOG_TO_HELP, True, "NAMES")

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        check_options(self)
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
