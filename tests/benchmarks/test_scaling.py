"""benchmarks.scaling: its rows, and what is added up and compared."""

import argparse
import json

import pytest
import torch

from benchmarks import scaling
from dspnet_fast.errors import InputError
from train.comparison.measuring import StepMeasurement

SECONDS = {"w0.50": 1.0, "w0.75": 2.0, "w1.00": 4.0}


@pytest.fixture
def steps(monkeypatch, policy):
    """Steps whose times and memory are known; returns what was measured."""
    policy("native")
    threads, measured = torch.get_num_threads(), []

    def measure_step(config, count):
        names = config.names()
        measured.append((torch.get_num_threads(), config.batch_size, config.image_size, config.dns, count))
        online = {name: SECONDS[name] * config.batch_size for name in names}
        return StepMeasurement(0.5, online, 0.25, 100 + 10 * len(names))

    monkeypatch.setattr(scaling, "measure_step", measure_step)
    yield measured
    torch.set_num_threads(threads)


def test_one_quantity_differs_from_the_first_row_at_a_time():
    options = argparse.Namespace(threads=[2, 1], batch_sizes=[8], image_sizes=[32, 64], families=[3, 1])
    rows = [(s.threads, s.batch_size, s.image_size, s.networks) for s in scaling.scales(options)]
    assert rows == [(2, 8, 32, 3), (1, 8, 32, 3), (2, 8, 64, 3), (2, 8, 32, 1)]


def test_shares_of_time_memory_and_multiply_accumulates(steps, tmp_path, capsys):
    out = tmp_path / "scaling.json"
    scales = ["--threads", "1", "--batch-sizes", "4", "--image-sizes", "32", "--families", "3,1"]
    scaling.main([*scales, "--steps", "2", "--json", str(out)])
    family, single = json.loads(out.read_text())
    assert family["scale"] == {"threads": 1, "batch_size": 4, "image_size": 32, "networks": 3}
    assert family["family"] == 4 * 7 + 0.75 and family["separate"] == 4 * 7 + 3 * 0.75
    assert family["memory"] == pytest.approx(130 / 110) and 0.5 < family["counted"] < 1
    assert (single["family"], single["counted"], single["memory"]) == (single["separate"], 1, 1)
    assert [dns for *_, dns, _ in steps] == ["w0.50", "w0.75", "w1.00", "w0.50,w0.75,w1.00"], "once each"
    assert "0.95" in capsys.readouterr().out


def test_unknown_number_of_networks_is_refused(steps):
    with pytest.raises(InputError, match="--families must be some of 1, 3, 5, 11"):
        scaling.main(["--families", "4"])
    assert not steps
