"""Contents of a run directory for the report: costs, accuracies, curves and collapse indicators of its networks."""

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
from ..costs.flops import network_cost
from ..evaluation.collapse import collapsed
from ..evaluation.plot_data import Point
from ..evaluation.verdict import VERDICT
from ..run.log import read_metrics, training_seconds
from ..run.saved_config import read_config

COMPARE = "compare.json"
ACCURACY_KEYS = ("top1", "majority", "mean_iou")  # keys of the accuracy that "interval" belongs to
PROTOCOL_NAMES = {"knn": "kNN", "dense": "mean IoU"}  # names in texts; others as in the file

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass
class Evaluation:
    """A file of OUT/evaluation.

    Attributes:
        file: name of the file.
        about: protocol, dataset and step.
        label: label of the accuracies.
        data: name of the images.
        step: training step of the evaluated weights; None if unknown.
        weights: source of a published network; None for networks of the run.
        series: accuracies of networks by column.
        lines: accuracies without a network, such as raw pixels.
        intervals: half-widths of their intervals.
        published: results of published networks on the same images, by name.
    """

    file: str
    about: str
    label: str
    data: str
    step: int | None = None
    weights: str | None = None
    series: dict[str, list[Point]] = field(default_factory=dict)
    lines: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, float] = field(default_factory=dict)
    published: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def column(self) -> str:
        """The column of the trained networks, to which `lines` compare."""
        return next(iter(self.series))

    def with_published(self) -> dict[str, list[Point]]:
        """The series, and one of each published network."""
        others = {name: found.series for name, found in self.published.items()}
        return self.series | {name: of[self.column] for name, of in others.items() if self.column in of}


def accuracy_of(result: object) -> tuple[float, float] | None:
    """Accuracy and half-width of its interval; None for any other value of an evaluation."""
    if not isinstance(result, dict) or "interval" not in result:
        return None
    name = next((name for name in ACCURACY_KEYS if name in result), None)
    return None if name is None else (float(result[name]), float(result["interval"]))


def read_evaluation(path: Path) -> Evaluation | None:
    """Read a file of OUT/evaluation of any protocol.

    Args:
        path: the JSON file.

    Returns:
        Its accuracies; None if it contains no accuracies of networks.

    Raises:
        InputError: if it is not JSON.
    """
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): evaluate again, or remove it") from error
    if not isinstance(report, dict) or not isinstance(report.get("networks"), dict):
        return None
    protocol = str(report.get("protocol", path.stem))
    protocol_name = PROTOCOL_NAMES.get(protocol, protocol)
    if "network_part" in report:
        protocol_name += f" of the {report['network_part']}"
    data, step = str(report.get("data", "unknown images")), report.get("step")
    images = report.get("test_images", report.get("queries"))
    about = f"{protocol_name} on {data}" + (f", {images:,} test images" if images else "")
    about += "" if step is None else f", after {step:,} steps"
    weights = report.get("weights")
    about += "" if weights is None else f", weights of {weights}"
    label = protocol_name if protocol == "dense" else f"{protocol_name} accuracy"
    found = Evaluation(path.name, about, label, data, step, weights)
    for name, network in report["networks"].items():
        for column, result in network.items():
            accuracy = accuracy_of(result)
            if accuracy is not None:
                title = (
                    protocol_name
                    if column in (protocol, "pretrained")
                    else f"{protocol_name} {column.replace('_', ' ')}"
                )
                point = Point(name, network["macs"], network["parameters"], *accuracy)
                found.series.setdefault(title, []).append(point)
    for name, result in report.items():
        accuracy = accuracy_of(result)
        if accuracy is not None:
            found.lines[name.replace("_", " ")], found.intervals[name.replace("_", " ")] = accuracy
    return found if found.series else None


def _with_published(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations of the run; `published` has those of published networks by the same protocol on the same images."""
    own = {(evaluation.label, evaluation.data): evaluation for evaluation in evaluations if evaluation.weights is None}
    shown = []
    for evaluation in evaluations:
        place = evaluation.label, evaluation.data
        if evaluation.weights is not None and place in own:
            (point,) = evaluation.series[evaluation.column]
            own[place].published[point.name] = evaluation
        else:
            shown.append(evaluation)
    return shown


class Run:
    """The contents of a run directory that the report shows; InputError if it is not one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.config: PretrainConfig = read_config(out, PretrainConfig)
        self.family: Family = family(self.config.network, self.config.names())
        self.metrics = read_metrics(out)
        files = sorted((out / "evaluation").glob("*.json"))
        read = {path.name: read_evaluation(path) for path in files}
        self.evaluations = _with_published([evaluation for evaluation in read.values() if evaluation is not None])
        self.skipped_files = [name for name, evaluation in read.items() if evaluation is None]
        self.manifests = {dn: _json(out / "exported" / dn / "manifest.json") for dn in self.family.names}
        self.comparison = read_comparison(out)
        self.verdict = self._read_verdict()

    def _read_verdict(self) -> dict[str, Any] | None:
        """The verdict of `train.evaluate knn --baselines`, otherwise that of the end of the run."""
        evaluation = _json(self.out / "evaluation" / "knn.json")
        if isinstance(evaluation, dict) and "verdict" in evaluation:
            return {"step": evaluation["step"], **evaluation["verdict"]}
        return _json(self.out / VERDICT)

    @property
    def epochs(self) -> float:
        """Number of epochs trained so far."""
        return next((line["epoch"] for line in reversed(self.metrics) if "epoch" in line), 0.0)

    @property
    def steps(self) -> int:
        """Last recorded step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, without measurements and checkpoints."""
        return training_seconds(self.out, self.config.batch_size)[0]

    @property
    def epoch_steps(self) -> float:
        """Steps per epoch; 1 if none were recorded."""
        return next((line["step"] / line["epoch"] for line in self.metrics if line.get("epoch")), 1.0)

    def curve(self, name: str) -> dict[str, Curve]:
        """A metric over epochs by network, or under "" if it does not belong to a network."""
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
        """Mean cosine similarity of prediction and target of the training images, over epochs by network."""
        return {dn: (xs, [1 - y / 4 for y in ys]) for dn, (xs, ys) in self.curve("loss").items()}


def _json(path: Path) -> Any:
    """Read a JSON file; None if it does not exist, InputError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): write it again, or remove it") from error


def read_comparison(out: Path) -> dict[str, Any] | None:
    """The report of train.compare in `out`, or of the comparison that `out` is a run of; None if there is none."""
    for folder in (out, out.resolve().parent.parent):
        found = _json(folder / COMPARE)
        if found is not None:
            if not isinstance(found, dict) or not {"accuracy", "runs", "ratios", "networks"} <= found.keys():
                raise InputError(f"{folder / COMPARE} is not a result of dspnet-compare: write it again, or remove it")
            return found
    return None


def network_summaries(run: Run) -> list[dict[str, Any]]:
    """Costs, latency, accuracies and collapse indicators of every network, smallest first, as JSON values."""
    std, rank = run.last("feature_std"), run.last("effective_rank")
    cosines = {dn: ys[-1] for dn, (_, ys) in run.cosines().items()}
    found = []
    for dn in run.family:
        cost = network_cost(run.config, dn, run.config.image_size)
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
                **asdict(cost),
                "latency": (run.manifests[dn.name] or {}).get("latency"),
                "accuracies": scores,
                "feature_std": std.get(dn.name),
                "effective_rank": rank.get(dn.name),
                "cosine_to_target": cosines.get(dn.name),
                "collapsed": collapsed(std.get(dn.name), rank.get(dn.name)),
            }
        )
    return found


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
