"""The images of a run: OUT/data_used.json, and resuming after images were added, removed or renamed."""

import json
import shutil

import pytest

from dspnet_fast.errors import InputError
from tests.interruption import stop_after
from train.pretrain import _main
from train.pretraining.run import PretrainRun
from train.run import checkpoint
from train.run.data_used import DATA_USED

STEPS, STOPPED = 20, 13  # 80 images in batches of 8, two epochs


def used(out):
    return json.loads((out / DATA_USED).read_text())


@pytest.fixture
def interrupted(small, images, tmp_path):
    """A run that was stopped after 13 steps, and its image folder, which may be changed."""
    folder, out = shutil.copytree(images, tmp_path / "photos"), tmp_path / "run"
    stop_after(small(data=str(folder), probe_epochs=0), STOPPED)
    return folder, out


def test_record_states_images_tests_and_what_is_left_out(small, images, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "photos")
    (folder / "train" / "blobs" / "notes.txt").write_text("no image")
    run = PretrainRun(small(data=str(folder), epochs=1), resume=False)
    run.run()
    found = used(run.out)
    assert (found["data"], found["images"], found["test_images"]) == (str(folder), 80, 40)
    assert found["left_out"] == "left out: 1 files ending in .txt"
    assert (
        "data  80 images for training, 40 held out for tests; left out: 1 files ending in .txt"
        in capsys.readouterr().out
    )
    assert DATA_USED in (run.out / "config.yaml").read_text()


def test_resume_with_the_same_images_keeps_the_record(interrupted):
    _, out = interrupted
    before = used(out)
    _main(["--resume", "--out", str(out)])
    assert used(out) == before and checkpoint.latest_step(out / "checkpoints") == STEPS


def test_digest_does_not_depend_on_the_folder(small, images, tmp_path):
    digests = set()
    for name in ("here", "there/deeper"):
        folder = shutil.copytree(images, tmp_path / name)
        run = PretrainRun(small(data=str(folder), out=str(tmp_path / "runs" / name), probe_epochs=0), resume=False)
        digests.add(used(run.out)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("added", [0, 30])
def test_resume_with_more_or_renamed_images_says_so_and_keeps_the_schedules(interrupted, added, capsys):
    folder, out = interrupted
    first = folder / "train" / "blobs" / "000.png"
    for k in range(added):
        shutil.copy(first, first.with_name(f"new{k}.png"))
    if not added:
        first.rename(first.with_name("other.png"))
    _main(["--resume", "--out", str(out)])
    said = "the images have changed since the run began: 110, before 80" if added else "the names of the 80 images"
    assert said in capsys.readouterr().out and said in (out / "train.log").read_text()
    found = used(out)
    assert (found["images"], found["since_step"], found["epoch_steps"]) == (80 + added, STOPPED, 10)
    assert [(old["images"], old["since_step"]) for old in found["earlier"]] == [(80, 0)]
    assert checkpoint.latest_step(out / "checkpoints") == STEPS, "the number of steps is unchanged"


def test_resume_with_fewer_images_is_refused_unless_the_record_is_removed(interrupted):
    folder, out = interrupted
    for k in range(20):
        (folder / "train" / "blobs" / f"{k:03}.png").unlink()
    with pytest.raises(InputError, match=f"has 60 images, and the run in .* used 80: put .* remove .*{DATA_USED}"):
        _main(["--resume", "--out", str(out)])
    (out / DATA_USED).unlink()
    _main(["--resume", "--out", str(out)])
    assert used(out)["images"] == 60


def test_damaged_record_is_named(interrupted):
    _, out = interrupted
    (out / DATA_USED).write_text("{")
    with pytest.raises(InputError, match=f"{DATA_USED} is damaged"):
        _main(["--resume", "--out", str(out)])
