"""python -m dspnet_fast.info: complete, parseable, and working with an invalid policy."""

import json
import sys

import pytest
import torch

from dspnet_fast import info, machine, verdicts
from dspnet_fast.ops import apex, registry
from dspnet_fast.verdicts import Verdict


def test_json_lists_machine_operators_and_providers(run_python):
    facts = json.loads(run_python("-m", "dspnet_fast.info", "--json", DSPNET_KERNELS=None))
    assert set(facts["ops"]) == set(registry.operators)
    for providers in facts["ops"].values():
        assert list(providers) == ["native", "cpp", "triton", "cuda", "apex"]
        for state in providers.values():
            assert state["available"] or state["reason"]
    assert facts["serving"] == dict.fromkeys(facts["ops"], "native")
    expected = "os, cpu, cores, cpu capability, torch, torchvision, triton, gpu, cuda operators, dali, apex"
    assert set(expected.split(", ")) <= set(facts["machine"])


def test_table_has_a_row_for_each_operator_and_a_line_for_each_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    info.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for operator, providers in registry.describe().items():
        (row,) = (line for line in lines if line[:1] == [operator])
        assert {word.strip(",") for word in row[1:]} == {"native", *registry.operators[operator].providers}
        for provider in registry.operators[operator].providers:
            reason = providers[provider]["reason"]
            assert not reason or any(line[:1] == [provider] and reason in " ".join(line) for line in lines)
    assert not any("no implementation" in " ".join(line) for line in lines)
    assert any({"operator", "chosen", "available", "unavailable"} <= set(line) for line in lines)


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "aarch64, implementer 0x41, part 0xd0c"),
    ],
)
def test_cpu_model_is_a_name_or_implementer_and_part(tmp_path, monkeypatch, cpuinfo, model):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine.cpu_model() == model


def test_several_reasons_of_a_provider_name_their_operators():
    def states(cpp, triton):
        return {"cpp": {"available": not cpp, "reason": cpp}, "triton": {"available": False, "reason": triton}}

    operators = {
        "one": states("", "no device"),
        "two": states("old", "no device"),
        "three": states("older", "no device"),
    }
    assert info._reasons(operators) == [("triton", "no device"), ("cpp", "two: old"), ("cpp", "three: older")]


def test_verdicts_of_this_device_are_listed_and_those_of_other_versions_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = verdicts.key(torch.device("cpu"))
    run = {"network": "resnet", "dns": "c8-d1111", "image_size": 32, "images": 8, "precision": "fp32"}
    for entries in (run, {"network": "resnet"}, {**run, "image_size": 64}):
        assert verdicts.write(Verdict("2026-12-01", key, entries, {}, None, "eager", "slower"))
    assert verdicts.write(Verdict("2026-12-01", {"device": "of another machine"}, run, {}, None, "eager", "slower"))
    found = info.collect()["verdicts"]
    assert sorted(verdict["run"].split(", ")[0] for verdict in found) == ["resnet c8-d1111", "resnet c8-d1111"]
    assert not any(verdict["outdated"] for verdict in found)


def test_invalid_policy_is_reported(run_python):
    facts = json.loads(run_python("-m", "dspnet_fast.info", "--json", DSPNET_KERNELS="cudo"))
    assert "unknown kernel provider 'cudo'" in facts["error"] and facts["ops"]
    assert "unknown kernel provider 'cudo'" in run_python("-m", "dspnet_fast.info", DSPNET_KERNELS="cudo")


@pytest.mark.parametrize(
    "folder, message", [("multi_tensor_apply", ""), ("i18n", "unrelated web toolkit"), (None, "absent")]
)
def test_unrelated_apex_is_recognised(tmp_path, monkeypatch, folder, message):
    if folder:
        (tmp_path / "apex" / folder).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed, reason = apex.installed()
    assert installed == (not message) and message in reason


def test_placeholder_dali_is_recognised(monkeypatch):
    installed = {"nvidia-dali": "0.0.1"}
    found = lambda *names: next((installed[name] for name in names if name in installed), "")  # noqa: E731
    monkeypatch.setattr(info, "installed_version", found)
    assert "placeholder" in info._dali()
    installed["nvidia-dali-cuda130"] = "2.4.0"
    assert info._dali() == "2.4.0"
