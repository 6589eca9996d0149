"""Operators succeed or raise an exception for any arguments: fuzzing.py makes the calls, in another process.

DSPNET_FUZZ_CALLS is the number of calls, DSPNET_TEST_SEED their seed.
"""

import ctypes
import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")

import fuzz_arguments  # noqa: E402
import fuzz_tensors  # noqa: E402
import fuzzing  # noqa: E402

CALLS = os.environ.get("DSPNET_FUZZ_CALLS", "600")
SEED = os.environ.get("DSPNET_TEST_SEED", "0")


def test_calls_succeed_or_raise(tmp_path):
    record = tmp_path / "call.py"
    program = [sys.executable, fuzzing.__file__, "--calls", CALLS, "--seed", SEED, "--record", str(record)]
    path = Path(__file__).parent.parent.parent
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (
        f"exit status {done.returncode}. The last call, to run in tests/ops:\n{record.read_text()}"
    )


def ends(action: Callable[..., object], *arguments: int) -> bool:
    """Whether the action ends a process."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        action(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_access_outside_guarded_memory_ends_the_process(at_end):
    """A read outside a tensor, or a write to a read-only one."""
    read, written = (fuzz_tensors.guarded(torch.ones(1001), at_end, written) for written in (False, True))
    for tensor in (read, written):
        first, size = tensor.data_ptr(), tensor.nbytes
        assert not ends(ctypes.string_at, first, size)
        assert ends(ctypes.string_at, first + size if at_end else first - 1, 1)
    assert not ends(ctypes.memset, written.data_ptr(), 0, written.nbytes)
    assert ends(ctypes.memset, read.data_ptr(), 0, 1)


def test_every_operator_has_a_form():
    """Otherwise valid arguments would be rare."""
    names = {target.name for target in fuzzing.targets()} - {"cuda_problem"}
    assert names <= set(fuzz_arguments.FORMS)
