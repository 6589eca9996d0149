"""`python -m train.compare`: a family from one run against each of its networks pretrained alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import Namespace

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry

from . import cli
from .comparison.design import DECIDED, CompareOptions, Comparison
from .comparison.runs import compare
from .comparison.tables import figures_of, tables_of
from .config import PretrainConfig, key
from .evaluation import drawing
from .evaluation.results import Report
from .reporting.findings import COMPARE

DESCRIPTION = """\
Pretrain each network of a family alone (BYOL) and all of them at once (DSPNet), by the same recipe, and compare what
they are worth and what they cost. Every run is a directory of dspnet-pretrain in OUT/runs. Writes OUT/compare.json,
compare.md and figures: accuracy per network both ways, training time and peak memory as measured, multiply-accumulates
as counted, and the ratios of the family to all separate runs and to the largest network alone, by parts of the step.

Several --seeds give means and ranges, several --subnets-per-step several families. What is finished is not done again,
and after Ctrl-C the same command goes on."""
EXAMPLE = """\
  dspnet-compare --fast-kernels --data fashion-mnist --network resnet --stem small --image-size 16 \\
      --dns c8-d1111,c16-d1111 --hidden-features 512 --out-features 128 --epochs 2 --batch-size 128 --base-lr 3 \\
      --warmup-epochs 0.2 --tau 0.99 --seeds 0,1 --out runs/compared
  dspnet-compare --config recipes/compare/family-5_mobilenet-v3_imagenet_300e.yaml --data DIR --out OUT"""


def make_parser() -> cli.ArgumentParser:
    """All options of the command."""
    parser = cli.parser("compare", DESCRIPTION, EXAMPLE)
    cli.add_config_file(parser)
    cli.add_options(parser, CompareOptions)
    cli.add_options(parser, PretrainConfig, without=DECIDED)
    return parser


def comparison_of(parsed: Namespace) -> Comparison:
    """What the command line asks for; InputError as `Comparison`."""
    names = [f.name for f in fields(PretrainConfig) if f.name not in DECIDED]
    recipe = PretrainConfig(**{name: parsed[key(name)] for name in names})
    return Comparison(cli.to_config(CompareOptions, parsed), recipe)


def publish(out: Path, report: Report) -> None:
    """Write and print the report."""
    tables = tables_of(report)
    atomic.write_text(out / COMPARE, json.dumps(report, indent=2) + "\n")
    atomic.write_text(out / "compare.md", "\n".join(table.markdown() for table in tables))
    written = [COMPARE, "compare.md"]
    for name, draw, _, _ in figures_of(report):
        written.append(f"compare-{name}.png")
        atomic.write_bytes(out / written[-1], drawing.png(draw))
    for table in tables:
        table.show()
    print(f"{out}: {', '.join(written)}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(argv)
    comparison = comparison_of(parsed)
    if not comparison.options.out:
        raise InputError("--out is missing: name a folder for the runs and the results, such as --out runs/compared")
    if parsed.fast_kernels:
        registry.fast_kernels()
    try:
        report = compare(comparison)
    except KeyboardInterrupt:
        print("what was computed is kept: the same dspnet-compare goes on from there", flush=True)
        raise
    publish(comparison.out, report)
    family = comparison.place(comparison.families[-1], comparison.seeds[0])
    print("as a page, with the curves of the run: dspnet-report", family)


if __name__ == "__main__":
    main()
