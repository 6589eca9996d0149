"""Output that cannot be written is an error of one line before anything is computed, for every command."""

import os
import shutil
import subprocess
import sys

import pytest

from dspnet_fast.atomic import check_writable
from dspnet_fast.errors import InputError
from train.run import checkpoint
from train.run.checkpoint import check_room

COMMANDS = """
train.pretrain --device cpu --out OUT/new --data DATA --network resnet --dns c8-d1111 --epochs 1
train.finetune --device cpu --from OUT/run --out OUT/new --data DATA
train.evaluate knn OUT/run
train.export OUT/run
train.embed OUT/run --data DATA --out OUT/features.npy
train.report OUT/run
train.compare --device cpu --out OUT/new --data DATA --network resnet --dns c8-d1111,c16-d1111 --batch-size 8
train.detect OUT/run --dn c8-d1111 --coco DATA
train.data.shard --data DATA --out OUT/new
train.data.inspect --data DATA --out OUT/new
"""
PROGRAM = """
import importlib, sys
for line in sys.argv[1].strip().splitlines():
    module, *argv = line.split()
    try:
        importlib.import_module(module).main(argv)
    except SystemExit as ended:
        print(module, ended.code, file=sys.stderr)
"""


@pytest.fixture
def disk(trained, tmp_path):
    """disk(setup, commands): run commands that see a disk of 32 MB with a run at OUT, after `setup`."""
    folder, content = tmp_path / "disk", tmp_path / "content"
    folder.mkdir()
    content.mkdir()
    shutil.move(trained, content / "run")
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and the program unshare")

    def run(setup, commands):
        mount = f"mount -t tmpfs -o size=32m none {folder} && cp -r {content}/. {folder}"
        command = ["sh", "-c", f'{mount} && cd {os.getcwd()} && {setup.replace("OUT", str(folder))} && exec "$@"', "sh"]
        program = [sys.executable, "-c", PROGRAM, commands.replace("OUT", str(folder))]
        return subprocess.run(["unshare", "--mount", *command, *program], capture_output=True, text=True, timeout=120)

    run.folder = folder
    return run


def test_read_only_output_is_refused_by_every_command(disk, images):
    ended = disk("mount -o remount,ro OUT", COMMANDS.replace("DATA", str(images)))
    assert ended.stdout == "", ended.stderr
    lines = iter(ended.stderr.splitlines())
    for module in (line.split()[0] for line in COMMANDS.strip().splitlines()):
        reason, code = next(lines), next(lines)
        assert reason.startswith(f"error: cannot write to {disk.folder}") and "Read-only file system; give" in reason
        assert code == f"{module} 2"


def test_full_disk_is_refused(disk, images):
    ended = disk(
        "(cat /dev/zero > OUT/filler 2>/dev/null || true)", COMMANDS.replace("DATA", str(images)).split("\n")[1]
    )
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: the disk is full: {disk.folder} could not be written")
    assert ended.stderr.endswith("train.pretrain 2\n")


def test_folder_that_can_be_created_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path / 'file'} is not a folder"):
        check_writable(tmp_path / "file" / "run")


def test_disk_without_room_for_checkpoints_is_named(tmp_path, trained, monkeypatch):
    state = checkpoint.load(checkpoint.newest_of_run(trained))
    check_room(tmp_path / "new", state, 3)
    free = 3 * checkpoint.size(state) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(InputError, match=f"3 checkpoints take .* GB, and the disk of {tmp_path} has .* GB free"):
        check_room(tmp_path / "new", state, 3)
