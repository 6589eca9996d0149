"""benchmarks.data: its photographs and its results."""

import importlib.util
import json

import pytest
from PIL import Image

from benchmarks import data

has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    data.photographs(path, 8, size=80)
    return path


def test_photographs_are_jpegs_of_the_given_size(folder):
    files = sorted(folder.iterdir())
    assert len(files) == 8
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (80, 80))
    assert len({path.read_bytes() for path in files}) == 8


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_results_have_all_variants_and_the_machine_readable_line(run_python, folder, tmp_path):
    options = ("--images", "8", "--batch-size", "4", "--image-size", "32", "--rounds", "1", "--wait-seconds", "0")
    printed = run_python("-m", "benchmarks.data", "--data", str(folder), *options, "--json", str(tmp_path / "r.json"))
    results = json.loads((tmp_path / "r.json").read_text())
    lines = results["variants"]
    assert set(lines) == {data.DECODE_PIL, data.PIL, data.TENSORS, data.OURS, data.DECODE_DALI, data.DALI}
    assert all(line["images/s"] > 0 for line in lines.values())
    assert max(lines[data.PIL]["x"], lines[data.TENSORS]["x"]) == 1
    assert printed.splitlines()[-1] == f"dali_cpu_vs_best_torchvision={lines[data.DALI]['x']:.2f}"
