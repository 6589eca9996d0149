"""`python -m train.export`: save the networks of a trained family for other libraries and for deployment."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dspnet_fast
from dspnet_fast import atomic, device_formats, exported, latency, onnx_file, program_file
from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import Classifier, Network, encoder_of, image_channels
from dspnet_fast.slim import slim
from dspnet_fast.subnets import Family, Subnet
from dspnet_fast.switchable import Switchable

from . import cli
from .config import FinetuneConfig, PretrainConfig
from .data.datasets.images import ImageDataset, Subset
from .evaluation.pretrained import EvaluatedFamily
from .evaluation.trained import TrainedRun
from .exporting.formats import FormatImages, formats_table
from .exporting.model_card import push, require_hub, write_card
from .run.options import check_options, count, option
from .run.progress import Monitor
from .teachers.teacher import exported_facts

DESCRIPTION = """\
Save each network <dn> of a run as OUT/exported/<dn>/model.safetensors and manifest.json: an ordinary network whose
weights load into timm's and torchvision's classes. Networks of timm:NAME and the like, in sizes that timm does not
have, are also saved as model.pt2, a program of torch.export. The manifest states the latency on this machine's CPU.
Networks of a run of dspnet-finetune include their classifier and return logits; the manifest names the classes. --onnx
adds model.onnx, and --formats fp16 and int8 ONNX, OpenVINO and ExecuTorch; --switchable adds one file of all networks
that can switch between them at run time."""
EXAMPLE = """\
  dspnet-export runs/first --dn w0.50
  dspnet-export runs/first --onnx --switchable
  dspnet-export runs/first --formats onnx-int8,openvino --card
  dspnet-export runs/finetuned"""
VERIFICATION_IMAGES = 8
SWITCHABLE = "switchable.safetensors"
INTERRUPTED = "networks that were exported before are whole: start again, with --dn for the others alone"


@dataclass(kw_only=True)
class ExportOptions:
    """Options of `train.export`."""

    onnx: bool = option(
        False,
        "also write model.onnx, and compare its outputs with PyTorch's on images of the run; needs pip install "
        "'dspnet-fast[onnx]'",
    )
    formats: str = option(
        "",
        f"further formats, separated by commas, verified and measured: {', '.join(device_formats.FILES)}",
        metavar="NAMES",
    )
    switchable: bool = option(False, f"also write OUT/exported/{SWITCHABLE}, for dspnet_fast.switchable")
    card: bool = option(False, "also write README.md, a model card for the Hugging Face Hub, with the run's accuracies")
    license: str = option("other", "licence of the weights that the card states, as the Hub names it", metavar="NAME")
    push: str = option(
        "",
        "account on the Hub to upload each network to, as NAME/<run>-<dn>; implies --card; needs huggingface_hub",
        metavar="NAME",
    )
    batch_size: int = count(1, "images per call for the latency measurement")
    threads: int | None = count(None, "threads for the latency measurement [PyTorch's number]")

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        check_options(self)
        if self.onnx:
            onnx_file.require()
        device_formats.require(self.format_names())
        if self.push:
            require_hub()

    def format_names(self) -> list[str]:
        """The names in `formats`."""
        return [name.strip() for name in self.formats.split(",") if name.strip()]


def export(out: Path, dns: Sequence[str] = (), options: ExportOptions | None = None) -> list[Path]:
    """Export subnets of a run.

    Any subnet contained in the largest network can be exported, even if the run did not train it. Post-statistics are
    measured unless an evaluation has stored them. Fine-tuned networks are exported with their classifier.

    Args:
        out: run directory of pretraining or fine-tuning.
        dns: names of subnets [those of the run].
        options: options of the command.

    Returns:
        The folders and files that were written.

    Raises:
        InputError: if the run or a name cannot be used.
        RuntimeError: if the ONNX model computes different outputs.
    """
    options = options or ExportOptions()
    run = TrainedRun(out)
    atomic.check_writable(out)
    subnets: Sequence[Subnet] = run.subnets(dns) or run.family
    family = Family(subnets) if options.switchable else None
    trained = run.load(subnets)
    sources = trained.restore_statistics(subnets)
    examples = _examples(trained, run.images())
    images = FormatImages(trained, run.images(), run.images("test")) if options.formats else None
    written = []
    with Monitor("export", len(subnets) + options.switchable) as monitor:
        for chosen in subnets:
            monitor.status(chosen.name)
            network = slim(trained.model, chosen)
            assert isinstance(network, Network | Classifier)
            converted, facts = _convert_and_time(network, run.image_size, examples, images, options)
            if ":" in encoder_of(network).name and not exported.loads_into(network, chosen):
                facts["program"] = _program(network, run.image_size, examples, converted)
                if "refused" in facts["program"]:
                    monitor.line(f"{chosen.name} {exported.PROGRAM} is not kept: {facts['program']['refused']}")
            for name, entry in facts.get("formats", {}).items():
                monitor.line(f"{chosen.name} {_sentence(name, entry)}")
            manifest = {
                "parameters": parameter_count(network),
                "macs": mac_count(network, run.image_size),
                "image_size": run.image_size,
                "pixels": run.format.pixels,
                "normalization": run.format.normalization,
                "batch_norm": {"statistics": "measured after training", **sources[chosen.name]},
                **_training_facts(trained, run.config),
                "teacher": exported_facts(out if isinstance(run.config, PretrainConfig) else Path(run.config.from_)),
                "made_by": {"dspnet_fast": dspnet_fast.__version__, "commit": _commit()},
                **facts,
            }
            exported.save(out / "exported" / chosen.name, network, chosen, manifest, converted, trained.classes)
            written.append(out / "exported" / chosen.name)
            if options.card or options.push:
                write_card(out, written[-1], options.license)
            if options.push:
                monitor.line(push(written[-1], f"{options.push}/{out.resolve().name}-{chosen.name}"))
            monitor.advance()
        if family is not None:
            assert isinstance(trained.model, Network | Classifier)
            runtime = Switchable.of(
                trained.model, family, run.image_size, run.format.normalization, trained.classes, run.format.pixels
            )
            runtime.measure(options.batch_size, threads=options.threads)
            runtime.save(out / "exported" / SWITCHABLE)
            written.append(out / "exported" / SWITCHABLE)
            monitor.advance()
    return written


def _training_facts(trained: EvaluatedFamily, config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """Facts about the training for the manifest."""
    facts = {"data": config.data, "steps": trained.step, "family": trained.family.names}
    if isinstance(config, FinetuneConfig):
        return {"finetuning": {"from": config.from_, **facts}}
    return {"pretraining": facts}


def _examples(trained: EvaluatedFamily, images: ImageDataset) -> Tensor:
    """Eight training images, [8, C, S, S], to verify converted networks."""
    few = Subset.up_to(VERIFICATION_IMAGES, images)
    return torch.cat(list(trained.batches(few, "images", 0))).contiguous()


def _program(
    network: Network | Classifier, image_size: int, examples: Tensor, files: dict[str, bytes]
) -> dict[str, Any]:
    """Add a program of torch.export to the files; returns its facts for the manifest."""
    try:
        content = program_file.convert(network, image_size)
        difference = program_file.compare(content, network, examples)
    except RuntimeError as error:
        return {"refused": str(error)}
    files[exported.PROGRAM] = content
    return {
        "file": exported.PROGRAM,
        "bytes": len(content),
        "torch": torch.__version__,
        "verified_on": len(examples),
        "largest_difference": difference,
    }


def _sentence(name: str, entry: dict[str, Any]) -> str:
    """A line about a format."""
    if "refused" in entry:
        return f"{name} is not kept: {entry['refused']}"
    lost = "" if entry["accuracy"] is None else f", accuracy {entry['accuracy']:.1%}, fp32 {entry['accuracy_fp32']:.1%}"
    return f"{name}: {entry['bytes']:,} bytes, cosine similarity {entry['cosine']:.5f}{lost}"


def _convert_and_time(
    network: Network | Classifier,
    image_size: int,
    examples: Tensor,
    of_formats: FormatImages | None,
    options: ExportOptions,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Convert to ONNX and other formats, as `options` say, and measure latency.

    Returns:
        Content of files by name, and facts for the manifest.
    """
    images = torch.randn(options.batch_size, image_channels(network), image_size, image_size)
    runtimes: dict[str, Callable[[], object]] = {"torch": lambda: network(images)}
    facts: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if options.onnx or options.formats:
        output = "logits" if isinstance(network, Classifier) else "features"
        converted = onnx_file.convert(network, image_size, output)
        if options.onnx:
            files[exported.ONNX] = converted
        session = onnx_file.Session(converted, options.threads)
        runtimes["onnxruntime"] = lambda: session(images)
        facts["onnx"] = {
            "bytes": len(converted),
            "opset": onnx_file.OPSET,
            "onnxruntime": session.version,
            "verified_on": len(examples),
            "largest_difference": onnx_file.verify(session, network, examples),
        }
        if of_formats is not None:
            facts["formats"] = {}
            fp32 = of_formats.accuracy(network)
            for name in options.format_names():
                try:
                    other = device_formats.convert(name, network, converted, of_formats.calibration, options.threads)
                    entry = of_formats.facts(name, other, network, examples)
                except RuntimeError as error:
                    facts["formats"][name] = {"refused": str(error)}
                    continue
                facts["formats"][name] = {**entry, "accuracy_fp32": fp32}
                runtimes[name] = functools.partial(other.run, images)
                files |= other.files
    with torch.no_grad():
        results = latency.measure(runtimes, threads=options.threads)
    facts["latency"] = {
        **latency.conditions(images.device, options.threads, options.batch_size, image_size),
        "of": {name: asdict(result) for name, result in results.items()},
    }
    return files, facts


def _commit() -> str | None:
    """The commit of this code; None outside a Git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("export", DESCRIPTION, EXAMPLE, "[options] OUT")
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain or dspnet-finetune")
    parser.add_argument(
        "--dn",
        action="append",
        metavar="NAME",
        help="network to export, also one that was not trained by itself; repeatable [all of the run]",
    )
    cli.add_options(parser, ExportOptions)
    parsed = parser.parse_args(argv)
    options, dns = cli.to_config(ExportOptions, parsed), parsed.dn or ()
    written = export(parsed.out, dns, options)
    for path in written:
        print(path)
    if options.formats:
        table = formats_table([path for path in written if path.is_dir()])
        atomic.write_text(parsed.out / "exported" / "formats.md", table.markdown())
        table.show()


main = cli.command(_main, interrupted=INTERRUPTED)

if __name__ == "__main__":
    main()
