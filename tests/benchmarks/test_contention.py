"""benchmarks.contention times steps alone and beside a busy process."""

import io
import json
import sys

import pytest

from benchmarks import contention
from benchmarks.contention import ADAPTS, GNU_DEFAULT, Contention
from dspnet_fast.verdicts import POLICIES

TINY = ["--dns", "w0.50,w1.00", "--image-size", "16", "--batch-size", "2", "--warm-up", "0"]


def test_worker_prints_the_seconds_of_the_requested_steps(monkeypatch, capsys, policy):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2 adapts\n"))
    contention.main([*TINY, "--worker", "eager"])
    policy("eager")  # restores the policy after the test
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(first) == 1 and len(second) == 2 and min(first + second) > 0


def test_last_line_compares_fast_kernels_that_adapt_with_the_default(monkeypatch, capsys):
    def measured(options, spin_counts):
        assert spin_counts == [ADAPTS, 7, GNU_DEFAULT]
        return {
            (name, count): Contention([1.02, 1.53, 1.0], [1.53, 3.0, 1.5])
            if count is ADAPTS
            else Contention([1.0, 1.4, 1.0], [3.0, 3.0, 3.0])
            for name in POLICIES
            for count in spin_counts
        }

    monkeypatch.setattr(contention, "measure", measured)
    contention.main(["--spin-counts", "7"])
    assert capsys.readouterr().out.splitlines()[-1] == "contended_ratio=1.50 quiet_cost=0.020"


def test_limit_that_is_no_number_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        contention.main(["--spin-counts", "2000,many"])
    assert end.value.code == 2 and "--spin-counts: invalid numbers value: '2000,many'" in capsys.readouterr().err
