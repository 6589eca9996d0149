"""benchmarks.contention times steps beside a busy process, and train limits the threads' spinning."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contention
from benchmarks.contention import GNU_DEFAULT, Contention
from train import SPIN_COUNT

ROOT = Path(__file__).parents[2]
TINY = ["--dns", "w0.50,w1.00", "--image-size", "16", "--batch-size", "2"]


def test_worker_prints_the_seconds_of_the_requested_steps(monkeypatch, capsys, policy):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    contention.main([*TINY, "--worker", "eager"])
    policy("eager")  # restores the policy after the test
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(first) == 1 and len(second) == 2 and min(first + second) > 0


def test_last_line_compares_fast_kernels_with_the_default_limit(monkeypatch, capsys):
    def measured(options, spin_counts):
        assert spin_counts == [SPIN_COUNT, 7, GNU_DEFAULT]
        return {
            (name, count): Contention(1.02, 1.53) if count == SPIN_COUNT else Contention(1.0, 3.0)
            for name in contention.FORMULATIONS
            for count in spin_counts
        }

    monkeypatch.setattr(contention, "measure", measured)
    contention.main(["--spin-counts", "7"])
    assert capsys.readouterr().out.splitlines()[-1] == "contended_ratio=1.50 quiet_cost=0.020"


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_train_limits_spinning_unless_the_environment_does(given, expected):
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys, train; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **given}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
