"""python -m dspnet_fast.info: complete, parseable, and never stopped by what it is to report."""

import json
import sys

import pytest

from dspnet_fast import info
from dspnet_fast.ops import apex, registry


def test_json(run_python):
    facts = json.loads(run_python("-m", "dspnet_fast.info", "--json", DSPNET_KERNELS=None))
    assert set(facts["ops"]) == set(registry.operators)
    for providers in facts["ops"].values():
        assert list(providers) == ["native", "cpp", "triton", "cuda", "apex"]
        for state in providers.values():
            assert state["available"] or state["reason"]
    assert facts["serving"] == dict.fromkeys(facts["ops"], "native")
    expected = "os, cpu, cores, cpu capability, torch, torchvision, triton, gpu, cuda operators, dali, apex"
    assert set(expected.split(", ")) <= set(facts["machine"])


def test_table_shows_every_provider_and_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    info.main([])
    printed = capsys.readouterr().out
    for operator, providers in registry.describe().items():
        assert operator in printed
        for provider, state in providers.items():
            assert any(provider in line and state["reason"] in line for line in printed.splitlines())
    assert "chosen" in printed


def test_a_policy_that_cannot_serve_is_shown(run_python):
    facts = json.loads(run_python("-m", "dspnet_fast.info", "--json", DSPNET_KERNELS="cudo"))
    assert "no kernel provider is called 'cudo'" in facts["error"] and facts["ops"]
    assert "no kernel provider is called 'cudo'" in run_python("-m", "dspnet_fast.info", DSPNET_KERNELS="cudo")


@pytest.mark.parametrize(
    "folder, said", [("multi_tensor_apply", ""), ("i18n", "unrelated web toolkit"), (None, "absent")]
)
def test_the_other_apex_is_recognised(tmp_path, monkeypatch, folder, said):
    if folder:
        (tmp_path / "apex" / folder).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    there, reason = apex.installed()
    assert there == (not said) and said in reason


def test_the_placeholder_dali_is_recognised(monkeypatch):
    installed = {"nvidia-dali": "0.0.1"}
    monkeypatch.setattr(info, "_version", lambda *names: next((installed[n] for n in names if n in installed), ""))
    assert "placeholder" in info._dali()
    installed["nvidia-dali-cuda130"] = "2.4.0"
    assert info._dali() == "2.4.0"
