"""write_tensors: equal contents are equal bytes, and other programs read them."""

import hashlib
import os
import stat
import sys

import torch
from safetensors import safe_open

from dspnet_fast.tensor_file import write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(7)}
PROGRAM = """
import sys, torch
from pathlib import Path
from dspnet_fast.tensor_file import write_tensors
write_tensors(Path(sys.argv[1]), {"x": torch.ones(3)}, {f"key {i}": "ä" for i in range(9)})
"""


def test_file_is_read_by_safetensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"z": "1", "ä": "2"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"z": "1", "ä": "2"}
        assert {name: file.get_tensor(name).tolist() for name in TENSORS} == {n: t.tolist() for n, t in TENSORS.items()}


def test_processes_write_the_same_bytes(tmp_path, run_python):
    digests = set()
    for i in range(3):
        run_python("-c", PROGRAM, str(tmp_path / f"{i}"))
        digests.add(hashlib.sha256((tmp_path / f"{i}").read_bytes()).digest())
    assert len(digests) == 1


def test_file_has_the_users_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "x", TENSORS, {})
    finally:
        os.umask(before)
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644
