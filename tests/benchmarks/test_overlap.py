"""The benchmark of --overlap-all-reduce, on two hosts and a slow cable for a moment."""

import contextlib
import shutil
import subprocess

import pytest
import torch.distributed as dist

from benchmarks import overlap
from benchmarks.cable import Cable

TINY = ["--dns=c8-d1111", "--image-size=16", "--batch-size=8", "--rounds=1", "--gbit=1"]


@pytest.fixture
def hosts():
    if not (shutil.which("ip") and shutil.which("tc") and dist.is_available()):
        pytest.skip("needs the programs ip and tc, and PyTorch with torch.distributed")
    with contextlib.ExitStack() as cleaning:
        try:
            Cable().lay(cleaning, 1)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces take root: {error.stderr.decode().strip()}")


def test_the_exchange_goes_through_the_cable(hosts, capfd):
    overlap.main(TINY)
    printed = capfd.readouterr().out
    said = " ".join(printed.split())  # lines break where the processor's name makes them
    megabytes = float(said.split(" MB of gradient")[0].split()[-1])
    cells = next(line for line in printed.splitlines() if line.startswith("│ 1 ")).split("│")
    milliseconds = float(cells[3])  # of the exchange alone
    assert milliseconds >= 0.5 * 8 * megabytes  # twice as fast is no cable of 10^9 bits a second
