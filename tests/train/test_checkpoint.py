"""Checkpoints: atomic writing, retention, damage detection, refusal of foreign files."""

import os
import pickle

import pytest
import torch

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from train.run import checkpoint


def test_save_keeps_the_newest_two(tmp_path):
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020.pt", "step-00000300.pt"]
    newest = checkpoint.latest(tmp_path)
    state = checkpoint.load(newest)
    assert state["step"] == 300 and state["model"]["w"].tolist() == [300, 300]


def test_keep_every_retains_checkpoints_of_its_multiples(tmp_path):
    for step in range(10, 80, 10):
        checkpoint.save(tmp_path, step, {}, keep=1, keep_every=30)
    assert [path.name[5:13] for path in sorted(tmp_path.iterdir())] == ["00000030", "00000060", "00000070"]


def test_save_marks_later_checkpoints_as_damaged(tmp_path):
    """Later checkpoints exist if a resumed run could not read them and continued from an earlier one."""
    for step in (10, 40, 50):
        checkpoint.save(tmp_path, step, {}, keep=3)
    checkpoint.save(tmp_path, 20, {}, keep=1)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["step-00000020.pt", "step-00000040.damaged", "step-00000050.damaged"]
    assert checkpoint.latest_step(tmp_path) == 20


def test_clear_rests_removes_temporary_files(tmp_path):
    (tmp_path / ".step-00000007.pt.123.tmp").touch()
    checkpoint.save(tmp_path, 10, {})
    assert len(list(tmp_path.iterdir())) == 2  # save leaves temporary files: another process may be writing them
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.pt"]


def test_nested_state_survives_a_round_trip(tmp_path):
    state = {"a": {"b": torch.arange(3), "c": torch.tensor(1.5, dtype=torch.bfloat16)}, "d": [1, "two", 3.0, None]}
    path = checkpoint.save(tmp_path, 7, state)
    got = checkpoint.load(path)
    assert got.pop("format") == checkpoint.FORMAT and got.pop("step") == 7
    assert got["d"] == state["d"] and torch.equal(got["a"]["b"], torch.arange(3))
    assert got["a"]["c"].dtype == torch.bfloat16 and got["a"]["c"] == 1.5


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_load_refuses_flipped_bits_of_the_content(tmp_path):
    """After a flipped bit anywhere in the file, loading fails or gives the original state."""
    state = {"w": torch.arange(100.0), "n": 5}
    path = checkpoint.save(tmp_path, 1, state)
    whole = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(whole), 97):
        flip(path, bit)
        try:
            got = checkpoint.load(path)
        except InputError:
            refused += 1
        else:
            assert got["step"] == 1 and got["n"] == 5 and torch.equal(got["w"], state["w"]), bit
        path.write_bytes(whole)
    assert refused > 20


def test_load_refuses_content_that_does_not_match_its_digest(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": torch.zeros(3)})
    state = torch.load(path, weights_only=True)
    torch.save({**state, "w": torch.ones(3)}, path)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_load_newest_skips_damaged_checkpoints(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.full((3,), float(step))})
    newest = checkpoint.latest(tmp_path)
    newest.write_bytes(newest.read_bytes()[:500])
    messages = []
    assert checkpoint.load_newest(tmp_path, "cpu", messages.append)["step"] == 1
    assert len(messages) == 1 and "step-00000002.pt" in messages[0] and "trying the one before" in messages[0]
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        checkpoint.load_newest(tmp_path, "cpu", messages.append)
    assert checkpoint.load_newest(tmp_path / "nothing", "cpu", messages.append) is None


def test_failed_write_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
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
def test_load_refuses_foreign_files_without_executing_them(tmp_path, content):
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
