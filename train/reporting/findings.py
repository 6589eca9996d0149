"""What a run directory says about its networks: costs, accuracies of every evaluation, curves, signs of collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspnet_fast.errors import InputError
from dspnet_fast.models import family
from dspnet_fast.subnets import Family

from ..config import PretrainConfig
from ..costs.flops import cost
from ..evaluation.collapse import collapsed
from ..evaluation.plot_data import Point
from ..run.log import read_metrics
from ..run.saved_config import read_config

COMPARE = "compare.json"
ACCURACIES = ("top1", "majority")  # what evaluations call the accuracy that their interval belongs to
WORDS = {"knn": "kNN"}

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass
class Evaluation:
    """One file of OUT/evaluation: accuracies of the networks by column, and of what is no network."""

    file: str
    about: str
    label: str
    step: int | None = None
    series: dict[str, list[Point]] = field(default_factory=dict)
    lines: dict[str, float] = field(default_factory=dict)


def accuracy_of(result: object) -> tuple[float, float] | None:
    """Accuracy and half its interval, if that is what a value of an evaluation is."""
    if not isinstance(result, dict) or "interval" not in result:
        return None
    name = next((name for name in ACCURACIES if name in result), None)
    return None if name is None else (float(result[name]), float(result["interval"]))


def read_evaluation(path: Path) -> Evaluation | None:
    """What a file of OUT/evaluation says, whichever protocol wrote it; None if it is no evaluation of networks.

    InputError if it is not JSON.
    """
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): evaluate again, or remove it") from error
    if not isinstance(report, dict) or not isinstance(report.get("networks"), dict):
        return None
    protocol = str(report.get("protocol", path.stem))
    word = WORDS.get(protocol, protocol)
    data, step = str(report.get("data", "unknown images")), report.get("step")
    images = report.get("test_images", report.get("queries"))
    about = f"{word} on {data}" + (f", {images:,} test images" if images else "")
    about += "" if step is None else f", after {step:,} steps"
    found = Evaluation(path.name, about, f"{word} accuracy on {data}", step)
    for name, network in report["networks"].items():
        for column, result in network.items():
            accuracy = accuracy_of(result)
            if accuracy is not None:
                title = word if column in (protocol, "pretrained") else f"{word} {column.replace('_', ' ')}"
                point = Point(name, network["macs"], network["parameters"], *accuracy)
                found.series.setdefault(title, []).append(point)
    for name, result in report.items():
        accuracy = accuracy_of(result)
        if accuracy is not None:
            found.lines[name.replace("_", " ")] = accuracy[0]
    return found if found.series else None


class Run:
    """What a run directory holds that the page shows; InputError if it holds no run."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.config: PretrainConfig = read_config(out, PretrainConfig)
        self.family: Family = family(self.config.network, self.config.names())
        self.metrics = read_metrics(out)
        files = sorted((out / "evaluation").glob("*.json"))
        read = {path.name: read_evaluation(path) for path in files}
        self.evaluations = [evaluation for evaluation in read.values() if evaluation is not None]
        self.left_out = [name for name, evaluation in read.items() if evaluation is None]
        self.manifests = {dn: _json(out / "exported" / dn / "manifest.json") for dn in self.family.names}
        self.comparison = read_comparison(out)

    @property
    def epochs(self) -> float:
        """How many were trained."""
        return next((line["epoch"] for line in reversed(self.metrics) if "epoch" in line), 0.0)

    @property
    def steps(self) -> int:
        """The last that was recorded."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def epoch_steps(self) -> float:
        """Steps in an epoch; 1 if none was recorded."""
        return next((line["step"] / line["epoch"] for line in self.metrics if line.get("epoch")), 1.0)

    def curve(self, name: str) -> dict[str, Curve]:
        """A metric over epochs, by network, or by "" if it is of all."""
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.metrics:
            value = line.get(name)
            if value is None:
                continue
            for dn, number in (value if isinstance(value, dict) else {"": value}).items():
                xs, ys = curves.setdefault(dn, ([], []))
                xs.append(line["step"] / self.epoch_steps)
                ys.append(number)
        order = [dn for dn in ("", *self.family.names) if dn in curves]
        return {dn: curves[dn] for dn in order}

    def last(self, name: str) -> dict[str, float]:
        """The last value of a metric, by network."""
        return {dn: ys[-1] for dn, (_, ys) in self.curve(name).items()}

    def cosines(self) -> dict[str, Curve]:
        """Mean cosine between what the online network predicts and the target of the other view, in training."""
        return {dn: (xs, [1 - y / 4 for y in ys]) for dn, (xs, ys) in self.curve("loss").items()}


def _json(path: Path) -> Any:
    """A JSON file; None if there is none, InputError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): write it again, or remove it") from error


def read_comparison(out: Path) -> dict[str, Any] | None:
    """What train.compare found, if it wrote to `out` or made the run in `out`; InputError if the file is damaged."""
    for folder in (out, out.resolve().parent.parent):
        found = _json(folder / COMPARE)
        if found is not None:
            if not isinstance(found, dict) or not {"accuracy", "runs", "ratios", "networks"} <= found.keys():
                raise InputError(f"{folder / COMPARE} is no result of dspnet-compare: write it again, or remove it")
            return found
    return None


def networks_of(run: Run) -> list[dict[str, Any]]:
    """The rows of the first table, smallest network first: what it costs, and all that is known of it, JSON values."""
    spread, rank = run.last("feature_std"), run.last("effective_rank")
    cosines = {dn: ys[-1] for dn, (_, ys) in run.cosines().items()}
    found = []
    for dn in run.family:
        of_network = cost(run.config, dn, run.config.image_size)
        scores = {
            column: {"accuracy": point.accuracy, "interval": point.interval, "step": evaluation.step}
            for evaluation in run.evaluations
            for column, points in evaluation.series.items()
            for point in points
            if point.name == dn.name
        }
        found.append(
            {
                "network": dn.name,
                **asdict(of_network),
                "latency": (run.manifests[dn.name] or {}).get("latency"),
                "accuracies": scores,
                "feature_std": spread.get(dn.name),
                "effective_rank": rank.get(dn.name),
                "cosine_to_target": cosines.get(dn.name),
                "collapsed": collapsed(spread.get(dn.name), rank.get(dn.name)),
            }
        )
    return found


def finite(value: Any) -> Any:
    """JSON values with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
