"""The choice among providers: policy, priority, refusals, what is recorded. On an operator made for the purpose."""

import dataclasses
import logging

import pytest
import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry


@pytest.fixture(scope="module")
def made():
    """An operator that adds 1. Its provider cpp adds 2, to small tensors; cuda says that it cannot; triton adds 3."""

    @registry.operator()
    def test_plus_one(x: Tensor, y: float = 0.0) -> Tensor:
        """Adds one."""
        return x + 1 + y

    asked = []

    def unsupported():
        asked.append("cuda")
        return False, "the moon is not full"

    def small(x, y=0.0):
        return x.numel() < 10, f"{x.numel()} elements are too many"

    test_plus_one.provider("cpp", devices=("cpu",), accepts=small)(lambda x, y=0.0: x + 2 + y)
    test_plus_one.provider("cuda", devices=("cpu", "cuda"), supported=unsupported)(lambda x, y=0.0: x)
    test_plus_one.provider("triton", devices=("cuda",), unproven="not measured")(lambda x, y=0.0: x + 3 + y)
    test_plus_one.asked = asked
    yield test_plus_one
    del registry.operators["test_plus_one"]
    registry._candidates.cache_clear()


@pytest.fixture(autouse=True)
def restored(policy):
    """Every test leaves the policy as it was."""


def value(op, size=3, *args) -> float:
    return op(torch.zeros(size), *args)[0].item()


def test_native_is_the_body(made):
    registry.set_policy("native")
    assert value(made) == 1
    assert value(made, 3, 5.0) == 6
    assert made.__doc__ == "Adds one."


def test_auto_takes_the_first_that_can(made):
    registry.set_policy("auto")
    assert value(made) == 2
    assert made(torch.zeros(3), y=5.0)[0] == 7
    assert registry.serving("cpu")["test_plus_one"] == "cpp"
    assert registry.serving("cuda")["test_plus_one"] == "native"  # cuda cannot, triton is unproven
    assert registry.serving("mps")["test_plus_one"] == "native"


def test_any_takes_what_nobody_has_measured_but_not_what_is_only_by_name(made, monkeypatch):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    registry.set_policy("any")
    assert registry.serving("cuda") == {"test_plus_one": "triton"}
    only_by_name = dataclasses.replace(made.providers["triton"], only_by_name="it gains nothing")
    monkeypatch.setitem(made.providers, "triton", only_by_name)
    registry._candidates.cache_clear()
    assert registry.serving("cuda") == {"test_plus_one": "native"}
    registry.set_policy("triton")
    assert registry.serving("cuda") == {"test_plus_one": "triton"}


@pytest.mark.parametrize("gpu, said", [(True, ["--fast-kernels leaves out triton: not measured"]), (False, [])])
def test_fast_kernels_says_what_it_leaves_out(made, monkeypatch, caplog, gpu, said):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    monkeypatch.setattr(registry, "_policy_of_environment", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert registry.fast_kernels() == {"test_plus_one": "native" if gpu else "cpp"}
    assert [record.getMessage() for record in caplog.records] == said


def test_auto_reports_a_refusal_once(made, caplog):
    registry.set_policy("auto")
    with caplog.at_level(logging.WARNING):
        assert value(made, 50) == 1
        assert value(made, 60) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "test_plus_one: not by cpp, because 50 elements are too many (reported once)"
    ]


def test_by_name_a_refusal_is_an_error(made, monkeypatch):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    registry.set_policy("cpp")
    assert value(made) == 2
    with pytest.raises(InputError, match="test_plus_one: cpp was asked for by name, but 50 elements are too many"):
        value(made, 50)


def test_by_name_an_operator_without_it_runs_natively(made, monkeypatch):
    normalized_mse = registry.operators["normalized_mse"]
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made, "normalized_mse": normalized_mse})
    registry.set_policy("triton")
    assert registry.serving("cuda") == {"test_plus_one": "triton", "normalized_mse": "native"}
    with pytest.raises(InputError, match="triton was asked for by name, but it serves cuda, not cpu"):
        value(made)


@pytest.mark.parametrize(
    "name, why", [("cuda", "test_plus_one: cuda .* the moon is not full"), ("cudo", "no kernel provider is called")]
)
def test_by_name_what_cannot_serve_is_an_error_at_once(made, monkeypatch, name, why):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    before = registry.get_policy()
    with pytest.raises(InputError, match=why):
        registry.set_policy(name)
    assert registry.get_policy() == before


def test_a_name_that_no_operator_has(monkeypatch):
    monkeypatch.setattr(registry, "operators", {})
    with pytest.raises(InputError, match="no operator has a cuda implementation"):
        registry.set_policy("cuda")


def test_describe_gives_every_reason(made):
    assert registry.describe()["test_plus_one"] == {
        "native": {"available": True, "reason": ""},
        "cpp": {"available": True, "reason": ""},
        "triton": {"available": True, "reason": "not measured"},
        "cuda": {"available": False, "reason": "the moon is not full"},
        "apex": {"available": False, "reason": "no implementation of this operator"},
    }
    assert registry.describe()["normalized_mse"]["triton"]["reason"] == "no implementation of this operator"


def test_the_machine_is_asked_once(made):
    for policy in ("auto", "native", "auto"):
        registry.set_policy(policy)
        value(made)
        registry.describe()
    assert made.asked == ["cuda"]


def test_a_compiled_graph_follows_the_policy(made):
    compiled = torch.compile(lambda x: made(x), fullgraph=True, backend="aot_eager")
    registry.set_policy("native")
    assert compiled(torch.zeros(3))[0] == 1
    registry.set_policy("auto")
    assert compiled(torch.zeros(3))[0] == 2


def test_opcheck(made):
    torch.library.opcheck(torch.ops.dspnet.test_plus_one.default, (torch.zeros(3), 1.0))


def test_accepts_receives_the_arguments_that_it_names(made, monkeypatch):
    monkeypatch.setattr(made, "providers", {})
    received = []

    def accepts(y, x):
        received.append((y, x.shape))
        return True, ""

    made.provider("cpp", devices=("cpu",), accepts=accepts)(lambda *args: args[0] + 2)
    registry.set_policy("auto")
    assert (value(made), value(made, 4, 0.5)) == (2, 2)
    assert received == [(0.0, (3,)), (0.5, (4,))]


def test_parameters_that_the_operator_does_not_have_are_an_error_at_registration(made):
    with pytest.raises(TypeError, match="test_plus_one has no argument z: it has x, y"):
        made.provider("cpp", devices=("cpu",), accepts=lambda x, z: (True, ""))
    for run in (lambda y, x: x, lambda x: x):
        with pytest.raises(TypeError, match="test_plus_one: cpp must take x, y, or *args".replace("*", r"\*")):
            made.provider("cpp", devices=("cpu",))(run)


ENVIRONMENT = """
import os, torch
from dspnet_fast.ops import ema_update, registry
os.environ["DSPNET_KERNELS"] = "read once, at import"
print(registry.get_policy())
try:
    registry.fast_kernels()
    ema_update([torch.zeros(1)], [torch.zeros(1)], 0.5)
except ValueError as error:
    print(error)
print(registry.get_policy())
"""


@pytest.mark.parametrize(
    "variable, printed",
    [
        (None, ["native", "auto"]),
        ("", ["native", "auto"]),
        ("native", ["native", "native"]),
        (
            "cudo",
            ["cudo", "no kernel provider is called 'cudo': use auto, any, native, cpp, triton, cuda, apex", "cudo"],
        ),
    ],
)
def test_environment_and_fast_kernels(run_python, variable, printed):
    assert run_python("-c", ENVIRONMENT, DSPNET_KERNELS=variable).splitlines() == printed
