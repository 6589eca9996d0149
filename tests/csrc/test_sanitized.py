"""`make sanitize` detects reads outside of tensors and integer overflow."""

import os
import subprocess
import sys

import pytest

from dspnet_fast.ops import cpp

FAULTY = cpp.LIBRARY.with_name("faulty.so")
pytestmark = pytest.mark.skipif("DSPNET_SANITIZE" not in os.environ, reason="requires the library of `make sanitize`")

SETUP = f"""
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
    ids=["no error", "after the end", "before the start", "freed", "overflow"],
)
def test_errors_abort_the_process(call, error):
    done = subprocess.run([sys.executable, "-c", SETUP + call], capture_output=True, text=True)
    assert bool(done.returncode) == bool(error) and error in done.stderr, done.stderr


def test_operators_contain_both_sanitizers():
    library = cpp.LIBRARY.read_bytes()
    assert b"__asan_report_load4" in library and b"__ubsan_handle_add_overflow" in library
