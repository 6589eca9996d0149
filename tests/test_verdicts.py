"""Verdicts in the user's cache: keys, damaged and unwritable files, two writers at once."""

import dataclasses
import json
import os

import pytest
import torch

from dspnet_fast import verdicts
from dspnet_fast.verdicts import Race, Verdict
from dspnet_fast.verification.supervisor import Outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def make(**changes):
    operators = {"norm_act": {"cpp": Outcome(True, "", 3, 0.5), "triton": Outcome(False, "off by 1")}}
    race = Race(16, {"eager": 0.2, "fused": 0.1}, 0.21, 7)
    verdict = Verdict("2026-12-01", {"device": "a"}, {"network": "resnet"}, operators, race, "fused", "2.00 times")
    return dataclasses.replace(verdict, **changes)


def test_verdict_is_read_as_it_was_written():
    for verdict in (make(), make(race=None, formulation="eager", run={"network": "other"})):
        assert verdicts.write(verdict) == verdicts.path_of(verdict.key, verdict.run)
        assert verdicts.read(verdict.key, verdict.run) == verdict
    assert verdicts.read({"device": "b"}, {"network": "resnet"}) is None
    assert sorted(found.formulation for found in verdicts.read_all()) == ["eager", "fused"]


def test_findings_give_a_reason_for_refused_providers():
    assert verdicts.findings(make().operators) == {("norm_act", "cpp"): "", ("norm_act", "triton"): "off by 1"}


def test_spread_is_the_difference_of_eager_and_eager():
    assert make().race.spread == pytest.approx(0.05)


def test_key_depends_on_threads_and_plugins(tmp_path):
    (tmp_path / "mine.py").write_text("")
    key = verdicts.key(CPU)
    assert {"device", "capability", "torch", "threads", "kernels"} <= key.keys()
    assert json.loads(json.dumps(key)) == key == verdicts.key(CPU)
    assert verdicts.key(CPU, str(tmp_path / "mine.py"))["kernels"] != key["kernels"]
    torch.set_num_threads(2)
    assert verdicts.differences(key, verdicts.key(CPU)) == "threads 2 instead of 1"


def test_differences_name_the_entries():
    old = {"torch": "2.11", "kernels": "a", "threads": 1}
    assert verdicts.differences(old, {"torch": "2.14", "kernels": "b", "threads": 1}) == (
        "torch 2.14 instead of 2.11, other kernels"
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"operators": {"a": {"b": {"c": 1}}}, "race": null}'])
def test_damaged_verdict_is_not_used_and_replaced(content, caplog):
    verdict = make()
    path = verdicts.write(verdict)
    path.write_text(content)
    assert verdicts.read(verdict.key, verdict.run) is None
    assert "is damaged" in caplog.text
    assert list(verdicts.read_all()) == []
    verdicts.write(verdict)
    assert verdicts.read(verdict.key, verdict.run) == verdict


def test_unwritable_cache_is_a_warning(cache, monkeypatch, caplog):
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    assert verdicts.write(make()) is None
    assert "the verdict is not kept for other runs" in caplog.text
    assert verdicts.read({}, {}) is None and list(verdicts.read_all()) == []


def test_two_writers_at_once_leave_whole_verdicts():
    writers = [make(reason=letter * 20_000) for letter in "ab"]
    verdicts.write(writers[0])
    children = []
    for verdict in writers:
        if not (child := os.fork()):
            for _ in range(50):
                verdicts.write(verdict)
            os._exit(0)
        children.append(child)
    while children:
        assert verdicts.read(writers[0].key, writers[0].run) in writers
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert os.listdir(verdicts.folder()) == [verdicts.path_of(writers[0].key, writers[0].run).name]
