"""benchmarks.data and its companions: that what they compare is comparable, and that what is wrong is found."""

import importlib.util
import json
import mmap

import pytest
import torch
from PIL import Image

from benchmarks import data, distributions, soak
from train.data.augmentation import byol, only
from train.data.datasets import open_images

has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    data.photographs(path, 8, size=80)
    return path


def test_photographs_are_jpegs_of_that_size(folder):
    files = sorted(folder.iterdir())
    assert len(files) == 8
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (80, 80))
    assert len({path.read_bytes() for path in files}) == 8


@pytest.mark.skipif(not has_dali, reason="DALI is not installed")
def test_command(run_python, folder, tmp_path):
    options = ("--images", "8", "--batch-size", "4", "--image-size", "32", "--rounds", "1", "--stall-timeout", "0")
    printed = run_python("-m", "benchmarks.data", "--data", str(folder), *options, "--json", str(tmp_path / "r.json"))
    results = json.loads((tmp_path / "r.json").read_text())
    lines = results["variants"]
    assert set(lines) == {data.DECODE_PIL, data.PIL, data.TENSORS, data.OURS, data.DECODE_DALI, data.DALI}
    assert all(line["images/s"] > 0 for line in lines.values())
    assert max(lines[data.PIL]["x"], lines[data.TENSORS]["x"]) == 1
    assert printed.splitlines()[-1] == f"dali_cpu_vs_best_torchvision={lines[data.DALI]['x']:.2f}"


def test_distributions_find_what_is_wrong(folder):
    """Another strength of one operation is outside the bounds; the operation itself, drawn anew, is not."""
    images = open_images(str(folder), "train")
    torch.manual_seed(0)
    for operation, wrong in (("solarize", "nothing"), ("brightness", "solarize")):
        specs, others = (tuple(only(view, name) for view in byol(32)) for name in (operation, wrong))
        halves = distributions.of_torchvision(images, specs, 400, 8)
        expected = halves[0] + halves[1]
        right, bad = (
            distributions.differences(distributions.of_backend("torchvision", images, chosen, 400, 8, 1), expected)
            for chosen in (specs, others)
        )
        bounds = {name: 3 * bound for name, bound in distributions.BOUNDS.items()}  # of 400 views, not 10,000
        assert all(right[name] <= bound for name, bound in bounds.items()), (operation, right)
        assert any(bad[name] > bound for name, bound in bounds.items()), (operation, bad)


@pytest.mark.parametrize("leaked", [0, 16])
def test_soak_finds_a_leak(folder, monkeypatch, capsys, leaked):
    """Batches that each keep some MiB of memory, new memory: earlier tests may have left the process a lot to reuse."""

    def batches(*_):
        kept = []
        while True:
            if leaked:
                kept.append(mmap.mmap(-1, leaked << 20))
                kept[-1].write(b"1" * len(kept[-1]))
            yield torch.ones(1)

    monkeypatch.setattr(soak, "open_batches", batches)
    with pytest.raises(SystemExit) as end:
        soak.main(["--data", str(folder), "--data-backend", "torchvision", "--batches", "50", "--batch-size", "4"])
    assert end.value.code == (1 if leaked else 0)
    assert "torchvision: 50 batches" in capsys.readouterr().out


def test_spectrum_and_histogram_of_known_images():
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    summary = distributions.summarize(flat)
    assert summary.histogram[77] == flat.numel() and summary.power.sum() == 0
    waves = (127 + 100 * torch.cos(2 * torch.pi * 4 * torch.arange(16) / 16)).byte().expand(1, 3, 16, 16)
    power = distributions.summarize(waves).power
    assert power.argmax() == 4 and power[4] > 0.99 * power.sum()  # 4 of 8 periods: the ring in the middle
