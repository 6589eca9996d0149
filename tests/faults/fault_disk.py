"""A full disk: a small file system in a mount namespace, which ends with its processes."""

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
from fault_lab import ForkServer, Lab, losses
from fault_table import Outcome, fault

from train.run import checkpoint

SIZE = "16m"
STOPPED_AT = 5  # between two checkpoints


def mounting(folder: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={SIZE} none {folder} && exec "$@"', "sh"]


def can_mount(folder: str) -> bool:
    found = shutil.which("unshare") is not None
    return found and subprocess.run([*mounting(folder), "true"], capture_output=True).returncode == 0


@fault("the disk is full")
def disk_full(lab: Lab) -> Outcome:
    disk = lab.folder / "disk"
    disk.mkdir()
    if not can_mount(str(disk)):
        pytest.skip("mounting a file system needs root and the program unshare")
    fork_server = ForkServer(*mounting(str(disk)))
    try:
        return _fill(Lab(fork_server, lab.images, lab.whole, lab.folder), lab)
    finally:
        fork_server.close()


def _fill(inside: Lab, lab: Lab) -> Outcome:
    inside.out = inside.folder / "disk" / "run"
    process = inside.start(pause_at=STOPPED_AT)
    inside.paused()
    inside.seen = Path(f"/proc/{inside.fork_server.pid}/root", *inside.out.parts[1:])  # from outside the namespace
    filler = inside.seen.parent / "filler"
    with open(filler, "wb", buffering=0) as file:
        with pytest.raises(OSError) as problem:
            while True:
                file.write(bytes(1 << 12))
        assert problem.value.errno == errno.ENOSPC
    inside.go()
    printed, code = process.end()
    for path in inside.checkpoints.glob("step-*.pt"):
        assert checkpoint.load(path)["step"] == 3
    assert checkpoint.latest_step(inside.checkpoints) == 3 and len(losses(inside.seen)) >= 3
    again, code_again = inside.start(resume=True).end()  # the disk is still full
    assert code_again == code and "the disk is full" in again and checkpoint.latest_step(inside.checkpoints) == 3
    filler.unlink()
    inside.resume()
    shutil.copytree(inside.seen, lab.out)
    assert "Traceback" not in printed + again
    return Outcome(printed, code)
