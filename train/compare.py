"""`python -m train.compare`: compare a jointly pretrained family with its networks pretrained separately."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import Namespace

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from . import cli
from .comparison.design import SET_BY_COMPARISON, CompareOptions, Comparison
from .comparison.runs import compare
from .comparison.tables import figures_of, tables_of
from .config import PretrainConfig
from .evaluation import drawing
from .evaluation.results import Report
from .reporting.findings import COMPARE
from .run.options import key

DESCRIPTION = """\
Pretrain each network of a family alone (BYOL) and all of them jointly (DSPNet) with the same options, and compare
accuracy and cost. Every run is a run directory of dspnet-pretrain in OUT/runs. Writes OUT/compare.json, compare.md and
figures: accuracies of the networks, measured training time and peak memory, counted multiply-accumulates, and ratios of
the family to all separate runs and to the largest network alone, for each part of a step. With --teacher the networks
alone and the family learn from it, and the family is trained by itself too.

Several --seeds give means and ranges; several --subnets-per-step give several families. Finished runs are not repeated.
After Ctrl-C the same command continues."""
EXAMPLE = """\
  dspnet-compare --fast-kernels --data fashion-mnist --network resnet --stem small --image-size 16 \\
      --dns c8-d1111,c16-d1111 --hidden-features 512 --out-features 128 --epochs 2 --batch-size 128 --base-lr 3 \\
      --warmup-epochs 0.2 --tau 0.99 --seeds 0,1 --out runs/compared
  dspnet-compare --config recipes/compare/family-5_mobilenet-v3_imagenet_300e.yaml --data DIR --out OUT"""


def make_parser() -> cli.ArgumentParser:
    """The parser of the command."""
    parser = cli.parser("compare", DESCRIPTION, EXAMPLE, "[options] --out DIR")
    cli.add_config_file(parser)
    cli.add_options(parser, CompareOptions)
    cli.add_options(parser, PretrainConfig, without=SET_BY_COMPARISON)
    return parser


def comparison_of(parsed: Namespace) -> Comparison:
    """The comparison that parsed options describe; raises InputError as `Comparison` does."""
    names = [f.name for f in fields(PretrainConfig) if f.name not in SET_BY_COMPARISON]
    config = PretrainConfig(**{name: parsed[key(name)] for name in names})
    return Comparison(cli.to_config(CompareOptions, parsed), config)


def publish(out: Path, report: Report) -> None:
    """Write the report and its figures to `out` and print the tables."""
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


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(argv)
    comparison = comparison_of(parsed)
    if not comparison.options.out:
        raise InputError("--out is missing: name a folder for the runs and the results, such as --out runs/compared")
    atomic.check_writable(comparison.out)
    publish(comparison.out, compare(comparison))
    family = comparison.run_directory(comparison.families[-1], comparison.seeds[0])
    print("report with the curves of the family: dspnet-report", family)


main = cli.command(_main)

if __name__ == "__main__":
    main()
