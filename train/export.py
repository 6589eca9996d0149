"""`python -m train.export`: cut the networks out of a trained family, for other libraries and for deployment."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dspnet_fast
from dspnet_fast import exported, latency, onnx_file
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.models import Classifier, Network, subnet
from dspnet_fast.slim import slim
from dspnet_fast.subnets import Family, Subnet
from dspnet_fast.switchable import Switchable

from . import cli
from .config import FamilyOptions, FinetuneConfig, PretrainConfig, option
from .data.datasets import open_images
from .data.datasets.images import Subset
from .data.normalization import MEAN, STD
from .evaluation.finetuned import FinetunedFamily
from .evaluation.pretrained import EvaluatedFamily, PretrainedFamily
from .run.progress import Monitor
from .run.saved_config import read_any_config

DESCRIPTION = """\
Write each desired network of a run as OUT/exported/<dn>/model.safetensors and manifest.json: an ordinary network
whose weights load into timm's and torchvision's classes; its latency on this machine's CPU is in the manifest.
Networks of a run of dspnet-finetune keep their classifier and give logits; the manifest names the classes.
With --onnx also model.onnx, with --switchable one file of all networks that switches between them while it runs."""
EXAMPLE = """\
  dspnet-export runs/first --dn w0.50
  dspnet-export runs/first --onnx --switchable
  dspnet-export runs/finetuned"""
VERIFICATION_IMAGES = 8
SWITCHABLE = "switchable.safetensors"


@dataclass(kw_only=True)
class ExportOptions:
    """Options of `train.export`."""

    onnx: bool = option(False, "also write model.onnx, verified with onnxruntime against PyTorch on images of the run")
    switchable: bool = option(False, f"also write OUT/exported/{SWITCHABLE}, for dspnet_fast.switchable")
    batch_size: int = option(1, "images a call when the latency is measured")
    threads: int | None = option(None, "threads when the latency is measured [as many as PyTorch takes]")

    def __post_init__(self) -> None:
        """Raise InputError for values that cannot be."""
        if self.batch_size < 1 or (self.threads is not None and self.threads < 1):
            raise InputError("--batch-size and --threads must be at least 1")
        if self.onnx:
            onnx_file.require()


def read_run(out: Path) -> PretrainConfig | FinetuneConfig:
    """The configuration of a run of train.pretrain or train.finetune; InputError if there is none."""
    config = read_any_config(out, PretrainConfig, FinetuneConfig)
    assert isinstance(config, PretrainConfig | FinetuneConfig)
    return config


def described(config: PretrainConfig | FinetuneConfig) -> tuple[FamilyOptions, str, int]:
    """The networks of a run, the name of its images, and their size in pixels."""
    options = config.family() if isinstance(config, FinetuneConfig) else config
    assert config.data is not None and config.image_size is not None
    return options, config.data, config.image_size


def wanted_subnets(out: Path, options: FamilyOptions, dns: Sequence[str], together: bool) -> Family | list[Subnet]:
    """The subnets of these names, those of the run by default; InputError if one is not within the run's largest.

    together: whether they must nest, to be switched between.
    """
    trained = Family(subnet(options.network, dn) for dn in options.names())
    subnets = [subnet(options.network, dn) for dn in dns] or list(trained)
    for wanted in subnets:
        if not wanted.within(trained.full):
            raise InputError(f"{wanted} is no part of {trained.full}, the largest network of {out}")
    return Family(subnets) if together else subnets


def export(out: Path, dns: Sequence[str] = (), options: ExportOptions | None = None) -> list[Path]:
    """Export the named subnets of the run in `out`, those of its family by default; returns what was written.

    Any subnet within the largest can be exported, also one that the run did not train by name. Statistics that an
    evaluation measured are used; without them they are measured here. Networks that train.finetune trained are
    exported with their classifier.

    Raises InputError if the run or a name cannot be used, RuntimeError if ONNX does not compute the same.
    """
    options = options or ExportOptions()
    config = read_run(out)
    described_as, data, image_size = described(config)
    subnets = wanted_subnets(out, described_as, dns, options.switchable)
    trained, classes = load_family(out, config)
    missing = [wanted for wanted in subnets if wanted.name not in trained.recall(subnets)]
    if missing:
        trained.measure(missing, open_images(data, "train"), data)
    sources = trained.recall(subnets)
    examples = _examples(trained, data) if options.onnx else None
    written = []
    with Monitor("export", len(subnets) + options.switchable) as monitor:
        for wanted in subnets:
            monitor.status(wanted.name)
            network = slim(trained.model, wanted)
            assert isinstance(network, Network | Classifier)
            converted, facts = _measured(network, image_size, examples, options)
            manifest = {
                "parameters": parameter_count(network),
                "macs": mac_count(network, image_size),
                "image_size": image_size,
                "normalization": {"mean": MEAN, "std": STD},
                "batch_norm": {"statistics": "measured after training", **sources[wanted.name]},
                **_training(trained, config),
                "made_by": {"dspnet_fast": dspnet_fast.__version__, "commit": _commit()},
                **facts,
            }
            exported.save(out / "exported" / wanted.name, network, wanted, manifest, converted, classes)
            written.append(out / "exported" / wanted.name)
            monitor.advance()
        if isinstance(subnets, Family):
            assert isinstance(trained.model, Network | Classifier)
            runtime = Switchable.of(trained.model, subnets, image_size, {"mean": MEAN, "std": STD}, classes)
            runtime.measure(options.batch_size, threads=options.threads)
            runtime.save(out / "exported" / SWITCHABLE)
            written.append(out / "exported" / SWITCHABLE)
            monitor.advance()
    return written


def load_family(out: Path, config: PretrainConfig | FinetuneConfig) -> tuple[EvaluatedFamily, list[str]]:
    """The trained family of a run, and the names of its classes, none for one that was pretrained."""
    if isinstance(config, FinetuneConfig):
        finetuned = FinetunedFamily(out, torch.device("cpu"))
        return finetuned, finetuned.classes
    return PretrainedFamily(out, torch.device("cpu")), []


def _training(trained: EvaluatedFamily, config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """What the manifest says of it."""
    facts = {"data": config.data, "steps": trained.step, "family": trained.family.names}
    if isinstance(config, FinetuneConfig):
        return {"finetuning": {"from": config.from_, **facts}}
    return {"pretraining": facts}


def _examples(trained: EvaluatedFamily, data: str) -> Tensor:
    """A few images that the family was trained on, [8, 3, S, S]."""
    images = open_images(data, "train")
    few = Subset.random(images, min(VERIFICATION_IMAGES, len(images)), seed=0)
    return torch.cat(list(trained.batches(few, "images", 0))).contiguous()


def _measured(
    network: Network | Classifier, image_size: int, examples: Tensor | None, options: ExportOptions
) -> tuple[bytes | None, dict[str, Any]]:
    """The network as ONNX if there are images to verify it by, and what the manifest says of that and of latency."""
    images = torch.randn(options.batch_size, 3, image_size, image_size)
    runtimes: dict[str, Callable[[], object]] = {"torch": lambda: network(images)}
    facts: dict[str, Any] = {}
    converted = None
    if examples is not None:
        output = "logits" if isinstance(network, Classifier) else "features"
        converted = onnx_file.convert(network, image_size, output)
        session = onnx_file.Session(converted, options.threads)
        runtimes["onnxruntime"] = lambda: session(images)
        facts["onnx"] = {
            "bytes": len(converted),
            "opset": onnx_file.OPSET,
            "onnxruntime": session.version,
            "verified_on": len(examples),
            "largest_difference": onnx_file.verify(session, network, examples),
        }
    with torch.no_grad():
        taken = latency.measure(runtimes, threads=options.threads)
    facts["latency"] = {
        **latency.conditions(images.device, options.threads, options.batch_size, image_size),
        "of": {name: asdict(result) for name, result in taken.items()},
    }
    return converted, facts


def _commit() -> str | None:
    """The commit of the code that runs, None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("export", DESCRIPTION, EXAMPLE)
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain or dspnet-finetune")
    parser.add_argument("--dn", action="append", help="a network to export, may be repeated [all of the run]")
    cli.add_options(parser, ExportOptions)
    parsed = parser.parse_args(argv)
    options, dns = cli.to_config(ExportOptions, parsed), parsed.dn or ()
    for path in export(parsed.out, dns, options):
        print(path)


if __name__ == "__main__":
    main()
