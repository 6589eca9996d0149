"""`python -m train.evaluate`: evaluate the representations of all networks of a pretrained family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dspnet_fast import atomic

from . import cli
from .evaluation.protocols import dense, knn, linear, semi
from .evaluation.protocols.common import EvaluationOptions
from .evaluation.results import Report

DESCRIPTION = """\
Evaluate all networks of a run of dspnet-pretrain, or a published network, on labelled images. Each protocol prints its
results and writes them to OUT/evaluation as JSON, Markdown and PNG. `dspnet-evaluate PROTOCOL --help` shows the options
of a protocol."""


class Protocol(NamedTuple):
    """An evaluation protocol: its help text, its module with DESCRIPTION and EXAMPLE, its options and functions."""

    help: str
    module: Any
    options: type[EvaluationOptions]
    evaluate: Callable[[Path, Any], Report]
    publish: Callable[[Path, Report], None]


PROTOCOLS = {
    "knn": Protocol(
        "k-nearest-neighbour classifiers; nothing is trained", knn, knn.KnnOptions, knn.evaluate_knn, knn.publish_knn
    ),
    "linear": Protocol(
        "linear classifiers on frozen representations",
        linear,
        linear.LinearOptions,
        linear.evaluate_linear,
        linear.publish_linear,
    ),
    "semi": Protocol(
        "linear classifiers and fine-tuning with 1 and 10 % of the labels",
        semi,
        semi.SemiOptions,
        semi.evaluate_semi,
        semi.publish_semi,
    ),
    "dense": Protocol(
        "linear classifiers of pixels on frozen feature maps, for images with masks",
        dense,
        dense.DenseOptions,
        dense.evaluate_dense,
        dense.publish_dense,
    ),
}


def make_parsers() -> dict[str, cli.ArgumentParser]:
    """The parsers of all protocols by name."""
    parsers = {}
    for name, protocol in PROTOCOLS.items():
        module = protocol.module
        parsers[name] = cli.parser(f"evaluate {name}", module.DESCRIPTION, module.EXAMPLE, "[options] OUT")
        parsers[name].add_argument(
            "out",
            type=Path,
            metavar="OUT",
            help="run directory of dspnet-pretrain, or with published --weights a folder for the results",
        )
        cli.add_config_file(parsers[name])
        cli.add_options(parsers[name], protocol.options)
    return parsers


def _main(argv: Sequence[str]) -> None:
    examples = "\n".join(protocol.module.EXAMPLE.splitlines()[0] for protocol in PROTOCOLS.values())
    parser = cli.parser("evaluate", DESCRIPTION, examples, "PROTOCOL [options] OUT")
    commands = parser.add_subcommands(dest="protocol")
    for name, made in make_parsers().items():
        commands.add_subcommand(name, made, help=PROTOCOLS[name].help)
    parsed = parser.parse_args(argv)
    protocol = PROTOCOLS[parsed.protocol]
    given = parsed[parsed.protocol]
    options = cli.to_config(protocol.options, given)
    out: Path = given.out
    atomic.check_writable(out)
    protocol.publish(out, protocol.evaluate(out, options))


main = cli.command(_main, several_ranks=True)

if __name__ == "__main__":
    main()
