"""The verdict: networks against untrained ones and raw pixels."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.commands import run
from train import evaluate, pretrain, report
from train.cli import DONE
from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.evaluation.accuracy import interval95
from train.evaluation.knn import knn
from train.evaluation.verdict import ADVICE, TAUGHT_ADVICE, UNLABELLED, Baseline, Score, describe, judge
from train.pretraining import probe
from train.pretraining.probe import Probe

PIXELS = Baseline("raw pixels", Score(0.30, 0.02))
UNTRAINED = Baseline("untrained", {"small": Score(0.15, 0.02), "large": Score(0.20, 0.02)})


def test_networks_better_than_everything_are_good_news():
    verdict = judge({"small": Score(0.36, 0.02), "large": Score(0.5, 0.02)}, [UNTRAINED, PIXELS], "kNN accuracy")
    assert verdict.good and verdict.conclusion == "Every network is better than untrained and raw pixels."
    assert verdict.details[1] == (
        "small  36.0% ± 2.0%, better than untrained (15.0% ± 2.0%), better than raw pixels (30.0% ± 2.0%)"
    )


def test_difference_within_both_intervals_is_not_better():
    verdict = judge({"small": Score(0.339, 0.02), "large": Score(0.23, 0.02)}, [UNTRAINED, PIXELS], "kNN accuracy")
    assert not verdict.good
    assert "not clearly different from raw pixels" in verdict.details[1]
    assert "worse than raw pixels" in verdict.details[2]
    assert verdict.conclusion == f"Not better than raw pixels: small, large; not better than untrained: large. {ADVICE}"


def test_teacher_is_shown_and_need_not_be_beaten():
    teacher = Baseline("the teacher", Score(0.8, 0.02), to_beat=False)
    verdict = judge({"small": Score(0.4, 0.02)}, [PIXELS, teacher], "kNN accuracy")
    assert verdict.good and "worse than the teacher (80.0% ± 2.0%)" in verdict.details[1]
    assert verdict.conclusion == "Every network is better than raw pixels."
    worse = judge({"small": Score(0.3, 0.02)}, [PIXELS, teacher], "kNN accuracy")
    assert (
        worse.conclusion == f"Not better than raw pixels: small. {TAUGHT_ADVICE}" and "--teacher" not in TAUGHT_ADVICE
    )


def test_networks_without_labels_are_described():
    values = {"effective_rank": {"small": 12.34}, "feature_std": {"small": 0.5}}
    untrained = {"effective_rank": {"small": 2.0}, "feature_std": {"small": 0.1}}
    assert describe(None, values).details == ("small  effective rank of the features 12.3, standard deviation 0.50",)
    verdict = describe(untrained, values)
    assert verdict.details[0].endswith("0.50; untrained: 2.0 and 0.10") and verdict.conclusion == UNLABELLED


@pytest.mark.parametrize("largest", [64, 4])
def test_raw_pixels_of_the_probe_equal_knn_on_the_views(images, monkeypatch, largest):
    monkeypatch.setattr(probe, "RAW_SIZE", largest)
    sets = [open_images(str(images), split) for split in ("train", "test")]
    found = Probe(*sets, 80, 12, torch.device("cpu"), BadImages(0))
    views = [found._reference.float(), found._query.float()]
    if largest == 4:
        views = [F.avg_pool2d(view, 3) for view in views]
    features = [view.flatten(1) for view in views]
    labels = found._reference_labels, found._query_labels
    expected = knn(features[0], labels[0], features[1], labels[1], k=20, num_classes=2)
    assert found.raw_pixels() == expected.majority and (found.references, found.queries) == (80, 40)


def test_run_ends_with_a_verdict_of_the_probe(finished):
    verdict = json.loads((finished / "verdict.json").read_text())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line["knn"] for line in lines if "knn" in line)
    assert verdict["step"] == 20 and "10 images with 20 references" in verdict["details"][0]
    for name, text in zip(last, verdict["details"][1:], strict=True):
        interval = interval95(last[name], 10)
        assert text.startswith(f"{name}  {last[name]:.1%} ± {interval:.1%}, ")
        assert f"untrained ({first[name]:.1%} ± " in text and "raw pixels (" in text
    log = (finished / "train.log").read_text()
    assert f"verdict  {verdict['conclusion']}" in log


def test_run_without_labels_describes_the_features(arguments, tmp_path):
    (tmp_path / "flat").mkdir()
    for index in range(16):
        Image.effect_noise((20, 20), 50).save(tmp_path / "flat" / f"{index:02}.png")
    assert run(pretrain, *arguments(data=tmp_path / "flat", epochs=1, warmup_epochs=0)) == DONE
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["conclusion"] == UNLABELLED and len(verdict["details"]) == 3


def test_run_without_probe_has_no_verdict(arguments, tmp_path):
    assert run(pretrain, *arguments(probe_epochs=0, epochs=1, warmup_epochs=0)) == DONE
    assert not (tmp_path / "run" / "verdict.json").exists()


def test_report_shows_the_verdict_of_the_evaluation_or_of_the_run(trained, capsys):
    page = trained / "report" / "index.html"
    ends = json.loads((trained / "verdict.json").read_text())["conclusion"]
    assert run(report, trained) == DONE
    assert f"After 20 steps: {ends}" in page.read_text()
    assert run(evaluate, "knn", trained, "--baselines", "--k", "5", "--workers", "0") == DONE
    evaluated = json.loads((trained / "evaluation" / "knn.json").read_text())["verdict"]
    assert evaluated["conclusion"] in capsys.readouterr().out
    assert "kNN accuracy on 40 test images" in evaluated["details"][0]
    assert run(report, trained) == DONE
    assert evaluated["details"][0] in page.read_text()
    shutil.rmtree(trained / "evaluation")
    (trained / "verdict.json").unlink()
    assert run(report, trained) == DONE
    assert "kNN accuracy on 40 test images" not in page.read_text() and "After 20 steps" not in page.read_text()
