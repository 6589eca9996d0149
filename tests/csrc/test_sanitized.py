"""That `make sanitize` finds what it is for: reads outside a tensor, and sums that overflow."""

import os
import subprocess
import sys

import pytest

from dspnet_fast.ops import cpp

FAULTY = cpp.LIBRARY.with_name("faulty.so")
pytestmark = pytest.mark.skipif("DSPNET_SANITIZE" not in os.environ, reason="only `make sanitize` has sanitizers")

CALL = f"""
import ctypes, torch
from ctypes import c_int64, c_void_p
faulty = ctypes.CDLL({str(FAULTY)!r})
tensor = torch.zeros(100)
address = c_void_p(tensor.data_ptr())
"""


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("faulty.read_at(address, c_int64(99)), faulty.add(c_int64(2**62), c_int64(1))", ""),
        ("faulty.read_at(address, c_int64(100))", "heap-buffer-overflow"),
        ("faulty.read_at(address, c_int64(-1))", "heap-buffer-overflow"),
        ("del tensor; faulty.read_at(address, c_int64(0))", "heap-use-after-free"),
        ("faulty.add(c_int64(2**63 - 1), c_int64(1))", "signed integer overflow"),
    ],
    ids=["no error", "behind", "before", "freed", "overflow"],
)
def test_errors_end_the_process(call, error):
    done = subprocess.run([sys.executable, "-c", CALL + call], capture_output=True, text=True)
    assert bool(done.returncode) == bool(error) and error in done.stderr, done.stderr


def test_the_operators_are_built_with_both():
    library = cpp.LIBRARY.read_bytes()
    assert b"__asan_report_load4" in library and b"__ubsan_handle_add_overflow" in library
