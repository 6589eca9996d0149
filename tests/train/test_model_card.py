"""Model cards of exported networks, and their upload."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from dspnet_fast.errors import InputError
from train import evaluate
from train.export import ExportOptions, export
from train.exporting.model_card import write_card

DN = "c8-d1111"


def test_card_states_network_data_accuracy_and_licence(trained, images):
    evaluate._main(["knn", str(trained), "--k=5", "--workers=0", "--device=cpu"])
    (folder,) = export(trained, [DN], ExportOptions(card=True, license="apache-2.0", threads=1))
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "image-feature-extraction"
    assert f"{images}, 20 steps, without labels" in body and "kNN" in body and "±" in body
    assert "teacher" not in body and "c8-d1111, c8-d1121, c16-d2121" in body


def test_card_lists_a_dense_evaluation_after_training_and_before(trained, masked):
    arguments = ("--data", str(masked), "--epochs=1", "--batch-size=8", "--workers=0", "--device=cpu")
    evaluate._main(["dense", str(trained), *arguments])
    (folder,) = export(trained, [DN], ExportOptions(card=True, threads=1))
    rows = [line.strip("| ").split(" | ") for line in (folder / "README.md").read_text().splitlines() if "IoU" in line]
    found = {row[0]: row[1:] for row in rows}
    networks = json.loads((trained / "evaluation" / "dense.json").read_text())["networks"]
    about = f"mean IoU on {masked}, 10 test images"
    for title, column, end in (("mean IoU", "dense", ", after 20 steps"), ("mean IoU untrained", "untrained", "")):
        share, of = found[title]
        assert share.startswith(f"{networks[DN][column]['mean_iou']:.1%} ± ") and of == about + end


def test_card_without_evaluations_says_so(trained):
    (folder,) = export(trained, [DN], ExportOptions(card=True, threads=1))
    assert "Its accuracy was not measured." in (folder / "README.md").read_text()


def test_card_states_the_teacher(trained):
    (folder,) = export(trained, [DN], ExportOptions(threads=1))
    manifest = json.loads((folder / "manifest.json").read_text())
    for licence, stated in (("mit", "mit"), (None, "not stated")):
        teacher = {"architecture": "resnet18", "licence": licence}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"teacher": teacher}))
        assert f"resnet18, licence: {stated}" in write_card(trained, folder, "other").read_text()


def test_push_uploads_the_folder(trained, monkeypatch, capsys):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda name, exist_ok: calls.append(name) or f"https://hub/{name}",
        upload_folder=lambda folder_path, repo_id: calls.append((folder_path, repo_id)),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    (folder,) = export(trained, [DN], ExportOptions(push="me", threads=1))
    assert calls == [f"me/run-{DN}", (folder, f"me/run-{DN}")] and (folder / "README.md").is_file()
    assert f"https://hub/me/run-{DN}" in capsys.readouterr().out


def test_push_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--push needs huggingface_hub, not installed here"):
        ExportOptions(push="me")
