"""Runs and their data: backends, shards, unreadable images and the time spent waiting."""

import importlib.util
import json

import pytest
import torch
import yaml
from PIL import Image

from dspnet_fast.errors import InputError
from tests.interruption import stop_after
from train.data.shard import ShardOptions, write_shards
from train.pretrain import _main
from train.pretraining.run import PretrainRun
from train.run import checkpoint
from train.run import meter as meter_module
from train.run.meter import Meter
from train.run.run_directory import BAD_IMAGES, read_bad_images

has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not has_dali, reason="DALI is not installed")
backends = pytest.mark.parametrize("backend", ["torchvision", pytest.param("dali-cpu", marks=needs_dali)])


def state(out):
    return checkpoint.load(checkpoint.newest_of_run(out))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def shards(images, tmp_path):
    write_shards(ShardOptions(data=str(images), out=str(tmp_path / "shards"), shards=3))
    return f"{tmp_path}/shards/{{000..002}}.tar"


@pytest.mark.parametrize(
    ("backend", "sharded"),
    [
        ("torchvision", True),
        pytest.param("dali-cpu", False, marks=needs_dali),
        pytest.param("dali-cpu", True, marks=needs_dali),
    ],
)
def test_resume_within_an_epoch_is_exact(small, shards, tmp_path, backend, sharded):
    options = {"data_backend": backend, **({"data": shards} if sharded else {})}
    PretrainRun(small(out=str(tmp_path / "whole"), **options), resume=False).run()
    stop_after(small(**options), 13)
    _main(["--resume", "--out", str(tmp_path / "run")])
    found, expected = state(tmp_path / "run"), state(tmp_path / "whole")
    for part in ("model", "momentum"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert metrics(tmp_path / "run")[-1]["knn"].keys() == metrics(tmp_path / "whole")[-1]["knn"].keys()


def test_run_keeps_the_backend_that_auto_chose(small, tmp_path):
    PretrainRun(small(), resume=False)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data_backend"] == "torchvision"
    with pytest.raises(InputError, match="another --data-backend" if has_dali else "needs NVIDIA DALI"):
        PretrainRun(small(data_backend="dali-cpu"), resume=True)
    PretrainRun(small(data_backend="auto"), resume=True)


@pytest.fixture
def damaged(tmp_path):
    """60 images of which two are unreadable."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for k in range(60):
        Image.new("RGB", (16, 16), (k, 255 - k, 9)).save(folder / f"{k:02}.png")
    for k in (7, 31):
        (folder / f"{k:02}.png").write_bytes(b"no image")
    return str(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_named(small, damaged, tmp_path, workers):
    PretrainRun(small(data=damaged, max_bad_images=2, workers=workers), resume=False).run()
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("left out") == 2 and "07.png" in log and "31.png" in log
    assert metrics(tmp_path / "run")[-2]["bad_images"] == 2
    assert state(tmp_path / "run")["step"] == 14


def test_too_many_unreadable_images_end_the_run_after_saving(small, damaged, tmp_path):
    run = PretrainRun(small(data=damaged, max_bad_images=1, probe_epochs=0), resume=False)
    with pytest.raises(InputError, match="--max-bad-images 1"):
        run.run()
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("left out") == 1 and "stopped and saved after step" in log
    assert state(tmp_path / "run")["step"] == run.trainer.step < 14


@backends
def test_unreadable_images_are_counted_over_the_whole_run(small, damaged, tmp_path, backend):
    """Each image is named once, also if it is read again in a later epoch or after resuming."""
    options = {"data": damaged, "data_backend": backend, "probe_epochs": 0}
    with pytest.raises(InputError, match="that is more than --max-bad-images 1"):
        PretrainRun(small(max_bad_images=1, **options), resume=False).run()
    first = list(read_bad_images(tmp_path / "run", damaged))
    assert len(first) == 1 and first[0].endswith(".png")
    with pytest.raises(
        InputError, match="that is more than --max-bad-images 1"
    ):  # the same image still exceeds the limit
        _main(["--resume", "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="left out 1 already: give at least 1"):
        PretrainRun(small(max_bad_images=0, **options), resume=True)
    _main(["--resume", "--out", str(tmp_path / "run"), "--max-bad-images", "2"])
    found = read_bad_images(tmp_path / "run", damaged)
    assert list(found)[:1] == first and {name[-6:] for name in found} == {"07.png", "31.png"}
    assert all(name.rsplit("/", 1)[-1] in reason for name, reason in found.items())
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("bad image 1 of 1") == log.count("bad image 2 of 2") == 1 and log.count("left out") == 2
    assert metrics(tmp_path / "run")[-1]["bad_images"] == 2


def test_damaged_list_of_unreadable_images_is_named(small, tmp_path):
    PretrainRun(small(), resume=False)
    (tmp_path / "run" / BAD_IMAGES).write_text("{")
    with pytest.raises(InputError, match=f"{BAD_IMAGES}.*remove it"):
        PretrainRun(small(), resume=True)


def test_default_limit_is_one_unreadable_image_in_a_thousand(small):
    assert PretrainRun(small(), resume=False).bad.limit == 0
    with pytest.raises(InputError, match="--max-bad-images must be at least 0, not -1"):
        small(max_bad_images=-1)


def test_meter_measures_throughput_and_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])

    def slow():
        for _ in range(4):
            now[0] += 3
            yield torch.zeros(6, 1, 2, 2)

    meter = Meter(slow())
    for _ in meter.batches():
        now[0] += 1
        with meter.paused():
            now[0] += 5
    assert meter.read() == (4 * 3 / 16, 12 / 16)
