"""Model cards: README.md of an exported network as the Hugging Face Hub shows it, and the upload of its folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import yaml

from dspnet_fast import atomic
from dspnet_fast.errors import InputError

from ..evaluation.verdict import UNTRAINED
from ..reporting.findings import read_evaluation
from ..run.tables import Table, percent

CARD = "README.md"


def write_card(out: Path, folder: Path, licence: str) -> Path:
    """Write README.md of an exported network.

    Args:
        out: run directory, whose evaluations the card lists.
        folder: the exported network.
        licence: identifier of the weights' licence on the Hub, such as apache-2.0.

    Returns:
        The path of the card.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    classifier = "num_classes" in manifest
    head: dict[str, Any] = {
        "license": licence,
        "library_name": "dspnet-fast",
        "pipeline_tag": "image-classification" if classifier else "image-feature-extraction",
        "tags": ["dspnet", "byol", "slimmable", manifest["network"]],
    }
    teacher = manifest.get("teacher") or {}
    of_teacher = f"{teacher.get('architecture')}, licence: {teacher.get('licence') or 'not stated'}"
    training = manifest.get("finetuning") or manifest["pretraining"]
    facts = [
        ["network", f"{manifest['network']} {manifest['dn']}"],
        ["parameters", f"{manifest['parameters']:,}"],
        ["multiply-accumulates", f"{manifest['macs']:,} at {manifest['image_size']} px"],
        ["output", f"{manifest['num_classes']} logits" if classifier else f"{manifest['features']} features"],
        [
            "trained on",
            f"{training['data']}, {training['steps']:,} steps, {'with' if classifier else 'without'} labels",
        ],
        ["family", ", ".join(training["family"])],
        *([["teacher", of_teacher]] if teacher else []),
    ]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {manifest['network']} {manifest['dn']}",
        "",
        "One network of a family that one self-supervised run of "
        "[DSPNet](https://arxiv.org/abs/2207.06075) trained jointly.",
        "",
        Table("About the network", ["", "value"], facts).markdown(),
        _accuracies(out, manifest["dn"]),
        "## Load",
        "",
        "    import dspnet_fast.exported",
        f'    network = dspnet_fast.exported.load("{folder.name}")   # this folder',
        "",
        f"Images are RGB from 0 to 1, normalised with {manifest['normalization']}.",
        *(f"With {name}: `{text}`." for name, text in manifest["loads_into"].items() if name != "then"),
        "",
    ]
    atomic.write_text(folder / CARD, "\n".join(lines))
    return folder / CARD


def _accuracies(out: Path, dn: str) -> str:
    """Table of the evaluations of a network; a sentence if there are none."""
    rows = []
    for path in sorted((out / "evaluation").glob("*.json")):
        evaluation = read_evaluation(path)
        if evaluation is None:
            continue
        for column, points in evaluation.series.items():
            about = evaluation.about
            if column.endswith(UNTRAINED):
                about = about.split(", after ")[0]  # steps of training
            rows += [[column, percent(p.accuracy, p.interval), about] for p in points if p.name == dn]
    if not rows:
        return "Its accuracy was not measured.\n"
    title = "Evaluations in percent; ± is the half-width of the 95 % interval"
    return Table(title, ["accuracy or mean IoU", "%", "protocol and images"], rows).markdown()


def require_hub() -> None:
    """Raise InputError if huggingface_hub is missing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError("--push needs huggingface_hub, not installed here: pip install huggingface_hub")


def push(folder: Path, repository: str) -> str:
    """Upload an exported network, with the account that huggingface_hub is logged in to.

    Args:
        folder: the exported network.
        repository: name of the repository on the Hub, such as me/dspnet-w0.50; created if it does not exist.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
    return str(address)
