"""The estimated duration of a run."""

import re

import pytest
import torch

from tests.commands import run
from train import pretrain
from train.cli import DONE
from train.costs.flops import network_costs, run_cost
from train.pretraining import duration
from train.pretraining.duration import TIMED, Duration
from train.run import tables

CPU = torch.device("cpu")
FULL = ["c16-d2121"]
ALL = ["c8-d1111", "c8-d1121", "c16-d2121"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(duration.time, "perf_counter", lambda: now[0])
    return now


def lines_of(config, clock, seconds, names, epoch_steps=1000):
    """The lines after each step, which take `seconds` and train `names`."""
    found = []
    timed = Duration(config, epoch_steps, CPU)
    for step, elapsed in enumerate(seconds, 1):
        clock[0] += elapsed
        found.append(timed.after_step(step, names))
    return found


def test_line_follows_three_steps_after_the_first(small, clock):
    found = lines_of(small(epochs=10, warmup_epochs=0), clock, [50, 2, 2, 2, 2], ALL)
    assert found[: TIMED + 1] == [None] * TIMED + ["10 epochs, 10,000 steps: about 5.6 h of training"]
    assert found[-1] is None


def test_pause_in_one_step_is_ignored(small, clock):
    found = lines_of(small(epochs=10, warmup_epochs=0), clock, [1, 2, 60, 2], ALL)
    assert "about 5.6 h" in found[-1]


def test_warm_up_steps_are_scaled_by_their_multiply_accumulates(small, clock):
    config = small(epochs=10, warmup_epochs=1)
    line = lines_of(config, clock, [1, 2, 2, 2], FULL)[-1]
    cost = run_cost(config, 1000, network_costs(config))
    shared = cost.target + cost.optimizer
    of_warm_up = (shared + cost.online[FULL[0]]) / 10_000
    expected = 2 * sum(cost.parts().values()) / of_warm_up
    assert float(re.search(r"about ([\d.]+) h", line).group(1)) == pytest.approx(expected / 3600, abs=0.06)
    assert expected > 1.2 * 2 * 10_000


def test_resumed_run_counts_the_steps_that_are_left(small, clock):
    timed = Duration(small(epochs=10, warmup_epochs=1), 1000, CPU)
    for step in range(9_901, 9_905):
        clock[0] += 1
        line = timed.after_step(step, ALL)
    assert line == "10 epochs, 10,000 steps: about 2 min of training"


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (360_000 * 10, "1,000 h")]
)
def test_durations_have_a_suitable_unit(seconds, words):
    assert tables.duration(seconds) == words


def test_run_prints_its_duration_once(arguments, capsys):
    assert run(pretrain, *arguments(probe_epochs=0)) == DONE
    assert re.findall(r"2 epochs, 20 steps: about \d+ s of training", capsys.readouterr().out) != []
