"""`python -m train.evaluate`: how good the representation of every network of a pretrained family is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import cli
from .evaluation.protocols import knn, linear, semi
from .evaluation.protocols.common import EvaluationOptions
from .evaluation.results import Report

DESCRIPTION = """\
Evaluate every desired network of a run of dspnet-pretrain. Each protocol writes its results to OUT/evaluation/, as
JSON, as Markdown and as a figure, and prints them."""


class Protocol(NamedTuple):
    """One way of evaluating."""

    help: str
    description: str
    example: str
    options: type[EvaluationOptions]
    evaluate: Callable[[Path, Any], Report]
    publish: Callable[[Path, Report], None]


PROTOCOLS = {
    "knn": Protocol(
        "nearest neighbours' votes, nothing trained",
        knn.DESCRIPTION,
        knn.EXAMPLE,
        knn.KnnOptions,
        knn.evaluate_knn,
        knn.publish_knn,
    ),
    "linear": Protocol(
        "a linear classifier on each network's frozen representation",
        linear.DESCRIPTION,
        linear.EXAMPLE,
        linear.LinearOptions,
        linear.evaluate_linear,
        linear.publish_linear,
    ),
    "semi": Protocol(
        "the labels of 1 and 10 percent of the images: linear classifiers and fine-tuning",
        semi.DESCRIPTION,
        semi.EXAMPLE,
        semi.SemiOptions,
        semi.evaluate_semi,
        semi.publish_semi,
    ),
}


def make_parsers() -> dict[str, cli.ArgumentParser]:
    """All options of every protocol."""
    parsers = {}
    for name, protocol in PROTOCOLS.items():
        parsers[name] = cli.parser(f"evaluate {name}", protocol.description, protocol.example)
        parsers[name].add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain")
        cli.add_config_file(parsers[name])
        cli.add_options(parsers[name], protocol.options)
    return parsers


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    examples = "\n".join(protocol.example.splitlines()[0] for protocol in PROTOCOLS.values())
    parser = cli.parser("evaluate", DESCRIPTION, examples)
    commands = parser.add_subcommands(dest="protocol")
    for name, made in make_parsers().items():
        commands.add_subcommand(name, made, help=PROTOCOLS[name].help)
    parsed = parser.parse_args(argv)
    protocol = PROTOCOLS[parsed.protocol]
    given = parsed[parsed.protocol]
    options = cli.to_config(protocol.options, given)
    out: Path = given.out
    try:
        report = protocol.evaluate(out, options)
    except KeyboardInterrupt:
        print("what was computed is kept: the same command goes on from there", flush=True)
        raise
    protocol.publish(out, report)


if __name__ == "__main__":
    main()
