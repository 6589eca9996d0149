"""`python -m train.report`: write an HTML report of a run: networks, accuracies, training curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspnet_fast import atomic

from . import cli
from .comparison.tables import figures_of, tables_of
from .evaluation import drawing
from .evaluation.collapse import MIN_RANK, MIN_STD
from .evaluation.plot_data import Point
from .reporting import figures, page
from .reporting.findings import COMPARE, Evaluation, Run, finite, network_summaries
from .run.progress import Monitor
from .run.tables import duration

DESCRIPTION = """\
Write OUT/report/index.html, a self-contained page about a run: its networks, their accuracies in all evaluations, the
training curves, and whether a network collapsed. The figures are also saved as PNG, the table as report.json. Run the
command again after further evaluations."""
EXAMPLE = """\
  dspnet-report runs/first"""


@dataclass
class Picture:
    """A figure with its file name, alternative text and caption."""

    name: str
    draw: drawing.Draw
    description: str
    caption: str


def pictures_of(run: Run) -> Iterator[Picture]:
    """All figures with data, in the order of the page; the first word of the name is the section."""
    for evaluation in run.evaluations:
        for cost, what in drawing.COSTS.items():
            yield Picture(
                f"accuracy-{Path(evaluation.file).stem}-{cost}",
                drawing.accuracy_figure(evaluation.with_published(), evaluation.lines, evaluation.label, cost),
                f"{evaluation.label} on {evaluation.data} of every network over {what}",
                f"{evaluation.about}. Bars: 95 % intervals.",
            )
    if run.comparison is not None:
        for name, draw, description, caption in figures_of(run.comparison):
            yield Picture(f"compare-{name}", draw, description, caption)
    longest = max((len(xs) for xs, _ in run.curve("loss").values()), default=0)
    means = " Long curves show means of consecutive steps." if longest > figures.POINTS else ""
    std = "Standard deviation of the features: 1 if they are isotropic, 0 if all are equal."
    curves = (
        ("training-loss", "loss", f"Loss of each network in the steps that train it, between 0 and 8.{means}"),
        ("training-learning_rate", "learning rate", "Learning rate."),
        ("training-images_per_second", "images/s", "Images per second, with two views of each."),
        ("training-data_wait", "fraction of time", "Fraction of the time that training waited for images."),
        ("collapse-feature_std", "feature std", std),
        ("collapse-effective_rank", "effective rank", "Effective rank: number of dimensions that the features occupy."),
        ("collapse-knn", "kNN accuracy", "kNN accuracy on a fixed small set of images."),
    )
    for name, label, caption in curves:
        section, _, metric = name.partition("-")
        if curve := run.curve(metric):
            probed = section == "collapse"
            draw = figures.curves(curve, label, percent=metric in ("data_wait", "knn"), mark=probed)
            yield Picture(name, draw, f"{label}{' of every network' if probed else ''} over epochs", caption)
    if cosines := run.cosines():
        caption = f"Cosine similarity of prediction and target, mean over both views: 1 - loss / 4.{means}"
        draw = figures.curves(cosines, "cosine")
        yield Picture("collapse-cosine", draw, "cosine similarity to the target of every network over epochs", caption)


def document(run: Run, networks: Sequence[Mapping[str, Any]], drawn: Mapping[str, str]) -> str:
    """The HTML document.

    Args:
        run: the run.
        networks: rows of the first table.
        drawn: HTML of the figures by name.
    """
    config = run.config
    title = f"{len(run.family)} {config.network} networks from one run"
    if len(run.family) == 1:
        title = f"{config.network} {run.family.full}, pretrained alone"
    body = ["<header>", page.heading(title, 1), page.paragraph(_state(run), "lead"), "</header>", "<main>"]
    body += [page.heading("The networks"), page.table(*table_of(networks, run.evaluations))]
    body += [*_verdict(run), _collapse(networks)]
    body += [page.paragraph(note, "note") for note in _notes(run, networks)]

    body.append(page.heading("Accuracy"))
    if not run.evaluations:
        body.append(page.paragraph("Not evaluated yet: run `dspnet-evaluate knn OUT`."))
    if run.skipped_files:
        body.append(
            page.paragraph(
                f"Not shown, because they contain no accuracies of networks: {', '.join(run.skipped_files)}."
            )
        )
    body.append(page.figures([drawn[name] for name in drawn if name.startswith("accuracy-")]))

    body.append(page.heading("Family compared with separate runs"))
    if run.comparison is None:
        body.append(page.paragraph(f"Not compared yet: `dspnet-compare` writes {COMPARE}."))
    else:
        body += [page.figures([drawn[name] for name in drawn if name.startswith("compare-")])]
        for table in tables_of(run.comparison):
            body += [page.table(table.heading, table.rows), page.paragraph(table.title, "note")]

    for section in ("training", "collapse"):
        shown = [drawn[name] for name in drawn if name.startswith(section)]
        body.append(page.heading("Training" if section == "training" else "Collapse indicators"))
        if shown and section == "collapse":
            body.append(page.table(*indicators_of(networks)))
        body.append(page.figures(shown) if shown else page.paragraph("Nothing recorded yet."))
    body += [page.folded("Configuration", page.options(asdict(config))), "</main>"]
    return page.page(title, body)


def _state(run: Run) -> str:
    config = run.config
    progress = (
        f"{run.epochs:.4g} of {config.epochs} epochs" if run.epochs < config.epochs else f"{config.epochs} epochs"
    )
    return (
        f"Pretrained on {config.data} without labels: {progress}, {run.steps:,} steps of {config.batch_size} images, "
        f"{config.image_size} px, {config.precision}."
        + (f" Training took {duration(run.seconds)}." if run.seconds else "")
        + (f" The networks learned from the teacher {config.teacher}." if config.teacher else "")
    )


def table_of(
    networks: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation] = ()
) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the first table, without empty columns; last come published networks and baselines."""
    columns = list(dict.fromkeys(column for network in networks for column in network["accuracies"]))
    runtimes = list(dict.fromkeys(name for n in networks if n["latency"] for name in n["latency"]["of"]))
    rows = []
    for network in networks:
        cells = [network["network"], f"{network['parameters']:,}", f"{network['macs'] / 1e6:,.1f} M"]
        for runtime in runtimes:
            times = (network["latency"] or {"of": {}})["of"].get(runtime)
            cells.append(f"{times['median_ms']:.2f}" if times else "–")
        for column in columns:
            score = network["accuracies"].get(column)
            cells.append(_score(score["accuracy"], score["interval"]) if score else "–")
        rows.append(cells)
    published: dict[str, dict[str, Point]] = {}
    for evaluation in evaluations:
        for name, found in evaluation.published.items():
            published.setdefault(name, {}).update({column: points[0] for column, points in found.series.items()})
    for name, scores in published.items():
        of = next(iter(scores.values()))
        cells = [name, f"{of.parameters:,}", f"{of.macs / 1e6:,.1f} M", *("–" for _ in runtimes)]
        found_scores = (scores.get(column) for column in columns)
        rows.append([*cells, *(_score(point.accuracy, point.interval) if point else "–" for point in found_scores)])
    for evaluation in evaluations:
        for name, accuracy in evaluation.lines.items():
            score = _score(accuracy, evaluation.intervals[name])
            cells = [score if column == evaluation.column else "–" for column in columns]
            rows.append([name, "–", "–", *("–" for _ in runtimes), *cells])
    heads = [*(f"{runtime} ms" for runtime in runtimes), *(f"{column} %" for column in columns)]
    return ["network", "parameters", "MACs", *heads], rows


def _score(accuracy: float, interval: float) -> str:
    return f"{100 * accuracy:.1f} ± {100 * interval:.1f}"


def indicators_of(networks: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table of collapse indicators at the last measurement."""
    styles = {"feature_std": ".3f", "effective_rank": ".1f", "cosine_to_target": ".3f"}
    rows = [
        [network["network"], *("–" if network[name] is None else f"{network[name]:{styles[name]}}" for name in styles)]
        for network in networks
    ]
    return ["network", "feature std", "effective rank", "cosine similarity to the target"], rows


def _verdict(run: Run) -> Iterator[str]:
    """The comparison with untrained networks and raw pixels."""
    if run.verdict is not None:
        text = f"After {run.verdict['step']:,} steps: {run.verdict['conclusion']}"
        yield page.paragraph(text, "" if run.verdict["good"] else "bad")
        yield from (page.paragraph(line, "note") for line in run.verdict["details"])


def _collapse(networks: Sequence[Mapping[str, Any]]) -> str:
    if all(network["feature_std"] is None for network in networks):
        return page.paragraph("Collapse indicators were not measured: `--probe-epochs` was 0.")
    collapsed = [network["network"] for network in networks if network["collapsed"]]
    rule = f"feature std below {MIN_STD:g} or effective rank below {MIN_RANK:g} at the last measurement"
    if collapsed:
        return page.paragraph(f"Collapsed: {', '.join(collapsed)} ({rule}).", "bad")
    return page.paragraph(f"No network collapsed ({rule}).")


def _notes(run: Run, networks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Notes on the numbers of the first table."""
    if run.evaluations:
        yield "± is the half-width of the 95 % interval."
    for evaluation in run.evaluations:
        if evaluation.step is not None and evaluation.step != run.steps:
            again = f"`dspnet-evaluate {Path(evaluation.file).stem} OUT`"
            yield f"{evaluation.file} evaluates step {evaluation.step:,}, not the last step: run {again} again."
    conditions = {
        f"batch of {of['batch_size']}, {of['image_size']} px, threads: {of['threads']}, {of['device']}"
        for of in (network["latency"] for network in networks)
        if of
    }
    if conditions:
        yield f"Milliseconds are median times of a call, measured by dspnet-export: {'; '.join(sorted(conditions))}."


def write(out: Path) -> Path:
    """Write the page, its figures and its table.

    Args:
        out: run directory of pretraining.

    Returns:
        Path of the page.

    Raises:
        InputError: if `out` is not such a run directory, or a file in it is damaged.
    """
    run = Run(out)
    atomic.check_writable(out)
    networks = network_summaries(run)
    pictures = list(pictures_of(run))
    folder = out / "report"
    drawn = {}
    with Monitor("report", len(pictures)) as monitor:
        for picture in pictures:
            rendered = drawing.render(picture.draw)
            atomic.write_bytes(folder / f"{picture.name}.png", rendered["light"])
            drawn[picture.name] = page.figure(rendered, picture.description, picture.caption)
            monitor.advance()
            monitor.status(picture.name)
    for stale in {path.name for path in folder.glob("*.png")} - {f"{name}.png" for name in drawn}:
        (folder / stale).unlink()
    table = {"step": run.steps, "training_seconds": run.seconds, "networks": finite(networks)}
    atomic.write_text(folder / "report.json", json.dumps(table, indent=2, allow_nan=False) + "\n")
    atomic.write_text(folder / "index.html", document(run, networks, drawn))
    return folder / "index.html"


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("report", DESCRIPTION, EXAMPLE, "[options] OUT")
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain")
    print(write(parser.parse_args(argv).out))


main = cli.command(_main, interrupted="the page was not written: start again")

if __name__ == "__main__":
    main()
