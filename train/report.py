"""`python -m train.report`: one page that shows a run: its networks, how good they are, how they were trained."""

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
from .evaluation.collapse import LEAST_RANK, LEAST_STD
from .reporting import figures, page
from .reporting.findings import COMPARE, Run, finite, networks_of
from .run.progress import Monitor

DESCRIPTION = """\
Write OUT/report/index.html: one page, with everything in it, that shows the networks of a run, their accuracy in every
evaluation that there is, how they were trained, and whether one of them collapsed. Also its figures as PNG and its
table as report.json. Run it again after another evaluation."""
EXAMPLE = """\
  dspnet-report runs/first"""


@dataclass
class Picture:
    """A figure, and the name of its file."""

    name: str
    draw: drawing.Draw
    description: str
    caption: str


def pictures_of(run: Run) -> Iterator[Picture]:
    """All figures that there is something to draw for, in the page's order; the name's first word is the section."""
    for evaluation in run.evaluations:
        for cost, what in drawing.COSTS.items():
            yield Picture(
                f"accuracy-{Path(evaluation.file).stem}-{cost}",
                drawing.accuracies(evaluation.series, evaluation.lines, evaluation.label, cost),
                f"{evaluation.label} of every network over {what}",
                f"{evaluation.about}. Bars are 95 % intervals.",
            )
    if run.comparison is not None:
        for name, draw, description, caption in figures_of(run.comparison):
            yield Picture(f"compare-{name}", draw, description, caption)
    longest = max((len(xs) for xs, _ in run.curve("loss").values()), default=0)
    means = " Of long runs, means of neighbouring steps." if longest > figures.POINTS else ""
    training = (
        ("loss", "loss", False, f"Loss of each network when it was sampled, from 0 to 8.{means}"),
        ("learning_rate", "learning rate", False, "Learning rate."),
        ("images_per_second", "images/s", False, "Images per second, two views of each."),
        ("data_wait", "share of the time", True, "Share of the time that training waited for images."),
    )
    for name, label, share, caption in training:
        if curve := run.curve(name):
            draw = figures.curves(curve, label, share)
            yield Picture(f"training-{name}", draw, f"{label} over epochs", caption)
    probes = (
        ("feature_std", "feature std", False, "Spread of the features: 1 if even in all directions, 0 if one point."),
        ("effective_rank", "effective rank", False, "Effective rank: how many directions the features use."),
        ("knn", "kNN accuracy", True, "kNN accuracy on a few images, the same at each measurement."),
    )
    for name, label, share, caption in probes:
        if curve := run.curve(name):
            draw = figures.curves(curve, label, share, mark=True)
            yield Picture(f"collapse-{name}", draw, f"{label} of every network over epochs", caption)
    if cosines := run.cosines():
        caption = (
            f"Cosine between prediction and target, mean over both views of the training images: 1 - loss / 4.{means}"
        )
        draw = figures.curves(cosines, "cosine")
        yield Picture("collapse-cosine", draw, "cosine to the target of every network over epochs", caption)


def document(run: Run, networks: Sequence[Mapping[str, Any]], drawn: Mapping[str, str]) -> str:
    """The page. drawn: HTML of the figures by name."""
    config = run.config
    title = f"{len(run.family)} {config.network} networks from one run"
    if len(run.family) == 1:
        title = f"{config.network} {run.family.full}, pretrained alone"
    body = ["<header>", page.heading(title, 1), page.paragraph(_state(run), "lead"), "</header>", "<main>"]
    body += [page.heading("The networks"), page.table(*table_of(networks)), _verdict(networks)]
    body += [page.paragraph(note, "note") for note in _notes(run, networks)]

    body.append(page.heading("Accuracy"))
    if not run.evaluations:
        body.append(page.paragraph("Not evaluated yet: `dspnet-evaluate knn OUT` does that."))
    if run.left_out:
        body.append(page.paragraph(f"Not shown, as they hold no accuracies of networks: {', '.join(run.left_out)}."))
    body.append(page.figures([drawn[name] for name in drawn if name.startswith("accuracy-")]))

    body.append(page.heading("Family against separate runs, and what they cost"))
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
        body.append(page.figures(shown) if shown else page.paragraph("Nothing was recorded yet."))
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
    )


def table_of(networks: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the first table; columns of which nothing is known are left out."""
    columns = list(dict.fromkeys(column for network in networks for column in network["accuracies"]))
    runtimes = list(dict.fromkeys(name for n in networks if n["latency"] for name in n["latency"]["of"]))
    rows = []
    for network in networks:
        cells = [network["network"], f"{network['parameters']:,}", f"{network['macs'] / 1e6:,.1f} M"]
        for runtime in runtimes:
            taken = (network["latency"] or {"of": {}})["of"].get(runtime)
            cells.append(f"{taken['median_ms']:.2f}" if taken else "–")
        for column in columns:
            score = network["accuracies"].get(column)
            cells.append(f"{100 * score['accuracy']:.1f} ± {100 * score['interval']:.1f}" if score else "–")
        rows.append(cells)
    heads = [*(f"{runtime} ms" for runtime in runtimes), *(f"{column} %" for column in columns)]
    return ["network", "parameters", "MACs", *heads], rows


def indicators_of(networks: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table of what tells whether a network collapsed, at the end of the curves."""
    styles = {"feature_std": ".3f", "effective_rank": ".1f", "cosine_to_target": ".3f"}
    rows = [
        [network["network"], *("–" if network[name] is None else f"{network[name]:{styles[name]}}" for name in styles)]
        for network in networks
    ]
    return ["network", "feature std", "effective rank", "cosine to the target"], rows


def _verdict(networks: Sequence[Mapping[str, Any]]) -> str:
    if all(network["feature_std"] is None for network in networks):
        return page.paragraph("Whether a network collapsed was not measured: `--probe-epochs` was 0.")
    fallen = [network["network"] for network in networks if network["collapsed"]]
    rule = f"feature std below {LEAST_STD:g} or effective rank below {LEAST_RANK:g} at the last measurement"
    if fallen:
        return page.paragraph(f"Collapsed: {', '.join(fallen)} ({rule}).", "bad")
    return page.paragraph(f"No network collapsed ({rule}).")


def _notes(run: Run, networks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the table's numbers hold for."""
    if run.evaluations:
        yield "± is half the 95 % interval."
    for evaluation in run.evaluations:
        if evaluation.step is not None and evaluation.step != run.steps:
            word = Path(evaluation.file).stem
            again = f"`dspnet-evaluate {word} OUT`"
            yield f"{evaluation.file} is of step {evaluation.step:,}, not of the last: {again}."
    conditions = {
        f"batch of {of['batch_size']}, {of['image_size']} px, threads: {of['threads']}, {of['device']}"
        for of in (network["latency"] for network in networks)
        if of
    }
    if conditions:
        yield f"Milliseconds are medians of a call, as measured at the export: {'; '.join(sorted(conditions))}."


def write(out: Path) -> Path:
    """Write the page, its figures and its table; returns where the page is. InputError if `out` holds no run."""
    run = Run(out)
    networks = networks_of(run)
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
    table = {"step": run.steps, "networks": finite(networks)}
    atomic.write_text(folder / "report.json", json.dumps(table, indent=2, allow_nan=False) + "\n")
    atomic.write_text(folder / "index.html", document(run, networks, drawn))
    return folder / "index.html"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("report", DESCRIPTION, EXAMPLE)
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory of dspnet-pretrain")
    print(write(parser.parse_args(argv).out))


if __name__ == "__main__":
    main()
