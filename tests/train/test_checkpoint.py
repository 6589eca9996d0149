"""Checkpoints are whole or not there, and hold nothing that runs."""

import os
import pickle

import pytest
import torch

from dspnet_fast.errors import InputError
from train import atomic, checkpoint


def test_round_trip_keeps_the_newest_two(tmp_path):
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020.pt", "step-00000300.pt"]
    newest = checkpoint.latest(tmp_path)
    state = checkpoint.load(newest)
    assert state["step"] == 300 and state["model"]["w"].tolist() == [300, 300]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic.write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/dspnet-fast-was-here",)


@pytest.mark.parametrize("content", ["pickle", "torch", "garbage", "truncated", "foreign"])
def test_what_is_not_ours_is_refused(tmp_path, content):
    path = tmp_path / "step-00000001.pt"
    if content == "pickle":
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    elif content == "torch":
        torch.save({"format": checkpoint.FORMAT, "model": Malicious()}, path)
    elif content == "garbage":
        path.write_bytes(b"\0" * 100)
    elif content == "truncated":
        checkpoint.save(tmp_path, 1, {"model": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"step-00000001.pt is not a"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/dspnet-fast-was-here")
