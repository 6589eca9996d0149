"""Device formats of an exported network, verified and measured on images of its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspnet_fast import device_formats, exported
from dspnet_fast.device_formats import Converted

from ..data.datasets.images import ImageDataset, Subset
from ..evaluation.knn import knn
from ..evaluation.pretrained import EvaluatedFamily
from ..run.tables import Table

CALIBRATION_IMAGES = 128
REFERENCES, QUERIES, NEIGHBOURS = 1000, 500, 20  # of the kNN accuracy
BATCH = 50
NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX, fp32"}


class FormatImages:
    """Images of a run that formats are calibrated and compared on.

    Args:
        trained: family of the run.
        train: training images of the run.
        test: its test images.

    Attributes:
        calibration: normalised training images.
    """

    def __init__(self, trained: EvaluatedFamily, train: ImageDataset, test: ImageDataset) -> None:
        self._trained = trained
        self.calibration = self._pixels(Subset.up_to(CALIBRATION_IMAGES, train))
        self.classes = len(train.classes)
        self._labelled = train.labels is not None and test.labels is not None
        if self._labelled:
            self._parts = Subset.up_to(REFERENCES, train), Subset.up_to(QUERIES, test)
            self._views = [self._pixels(part) for part in self._parts]

    def _pixels(self, images: ImageDataset) -> Tensor:
        return torch.cat(list(self._trained.batches(images, "images", 0))).contiguous()

    @torch.no_grad()
    def accuracy(self, run: Callable[[Tensor], Tensor]) -> float | None:
        """kNN accuracy of features, or top-1 accuracy of a classifier's logits; None without labels."""
        if not self._labelled:
            return None
        (references, queries) = self._parts
        assert references.labels is not None and queries.labels is not None
        outputs = [torch.cat([run(batch) for batch in views.split(BATCH)]) for views in self._views]
        if outputs[0].shape[1] == self.classes:
            return (outputs[1].argmax(1) == queries.labels).float().mean().item()
        k = min(NEIGHBOURS, len(references))
        found = knn(outputs[0], references.labels, outputs[1], queries.labels, num_classes=self.classes, k=k)
        return found.majority

    def facts(self, name: str, converted: Converted, network: nn.Module, examples: Tensor) -> dict[str, Any]:
        """Entries of the manifest for a format; RuntimeError if its outputs are too different."""
        return {
            "files": list(converted.files),
            "bytes": converted.size,
            "runtime": converted.runtime,
            **({"calibrated_on": len(self.calibration)} if name == "onnx-int8" else {}),
            "verified_on": len(examples),
            **device_formats.compare(name, converted, network, examples),
            "accuracy": self.accuracy(converted.run),
            **({"accuracy_on": len(self._parts[1])} if self._labelled else {}),
        }


def formats_table(folders: Sequence[Path]) -> Table:
    """Table of the formats of exported networks: size, latency, difference and accuracy, from their manifests."""
    manifests = [json.loads((folder / exported.MANIFEST).read_text()) for folder in folders]
    rows = []
    for folder, manifest in zip(folders, manifests, strict=True):
        formats: dict[str, Any] = manifest["formats"]
        size = (folder / exported.WEIGHTS).stat().st_size
        accuracy = next((entry["accuracy_fp32"] for entry in formats.values() if "refused" not in entry), None)
        entries = {"torch": {"bytes": size, "accuracy": accuracy}, "onnxruntime": manifest["onnx"], **formats}
        for name, entry in entries.items():
            row = [manifest["dn"] if name == "torch" else "", NAMES.get(name, name)]
            if "refused" in entry:
                rows.append([*row, "not kept", "", "", "", ""])
                continue
            row += [f"{entry['bytes'] / 1e6:.2f}", f"{manifest['latency']['of'][name]['median_ms']:.2f}"]
            for key, style in (("largest_difference", ".2g"), ("cosine", ".5f"), ("accuracy", ".1%")):
                row.append(f"{entry[key]:{style}}" if entry.get(key) is not None else "")
            rows.append(row)
    of = manifests[0]["latency"]
    title = (
        f"Formats. Latency: median of a call with {of['batch_size']} images of {of['image_size']} px, threads: "
        f"{of['threads']}, {of['device']}."
    )
    queries = {entry.get("accuracy_on") for manifest in manifests for entry in manifest["formats"].values()} - {None}
    title += f" Accuracy: of {queries.pop():,} test images." if queries else ""
    return Table(title, ["network", "format", "MB", "ms", "largest difference", "cosine similarity", "accuracy"], rows)
