"""The choice of providers by policy and priority, rejected arguments, and log messages, with a test operator."""

import dataclasses
import logging

import pytest
import torch
from torch import Tensor

from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry


@pytest.fixture(scope="module")
def made():
    """An operator that adds 1. Provider cpp adds 2 to small tensors, cuda is unavailable, triton adds 3."""

    @registry.operator()
    def test_plus_one(x: Tensor, y: float = 0.0) -> Tensor:
        """Adds one."""
        return x + 1 + y

    asked = []

    def unsupported():
        asked.append("cuda")
        return False, "no such device"

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
    """Restore the policy after every test."""


def value(op, size=3, *args) -> float:
    return op(torch.zeros(size), *args)[0].item()


def test_native_policy_runs_the_body(made):
    registry.set_policy("native")
    assert value(made) == 1
    assert value(made, 3, 5.0) == 6
    assert made.__doc__ == "Adds one."


def test_auto_chooses_the_first_available_provider(made):
    registry.set_policy("auto")
    assert value(made) == 2
    assert made(torch.zeros(3), y=5.0)[0] == 7
    assert registry.serving("cpu")["test_plus_one"] == "cpp"
    assert registry.serving("cuda")["test_plus_one"] == "native"  # cuda is unavailable, triton unproven
    assert registry.serving("mps")["test_plus_one"] == "native"


def test_any_chooses_unproven_providers_but_not_those_chosen_by_name_only(made, monkeypatch):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    registry.set_policy("any")
    assert registry.serving("cuda") == {"test_plus_one": "triton"}
    only_by_name = dataclasses.replace(made.providers["triton"], only_by_name="it gains nothing")
    monkeypatch.setitem(made.providers, "triton", only_by_name)
    registry._candidates.cache_clear()
    assert registry.serving("cuda") == {"test_plus_one": "native"}
    registry.set_policy("triton")
    assert registry.serving("cuda") == {"test_plus_one": "triton"}


@pytest.mark.parametrize("gpu, said", [(True, ["--fast-kernels does not use triton: not measured"]), (False, [])])
def test_fast_kernels_warns_of_unproven_providers(made, monkeypatch, caplog, gpu, said):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    monkeypatch.setattr(registry, "_policy_of_environment", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert registry.fast_kernels() == {"test_plus_one": "native" if gpu else "cpp"}
    assert [record.getMessage() for record in caplog.records] == said


def test_auto_logs_rejected_arguments_once(made, caplog):
    registry.set_policy("auto")
    with caplog.at_level(logging.WARNING):
        assert value(made, 50) == 1
        assert value(made, 60) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "test_plus_one: cpp is not used, because 50 elements are too many (reported once)"
    ]


def test_rejected_arguments_are_an_error_for_a_provider_chosen_by_name(made, monkeypatch):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    registry.set_policy("cpp")
    assert value(made) == 2
    with pytest.raises(InputError, match="test_plus_one: cpp was chosen by name, but 50 elements are too many"):
        value(made, 50)


def test_operator_without_the_chosen_provider_runs_natively(made, monkeypatch):
    normalized_mse = registry.operators["normalized_mse"]
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made, "normalized_mse": normalized_mse})
    registry.set_policy("triton")
    assert registry.serving("cuda") == {"test_plus_one": "triton", "normalized_mse": "native"}
    with pytest.raises(InputError, match="triton was chosen by name, but it runs on cuda, not cpu"):
        value(made)


@pytest.mark.parametrize(
    "name, why", [("cuda", "test_plus_one: cuda .* no such device"), ("cudo", "unknown kernel provider")]
)
def test_choosing_an_unavailable_provider_is_an_error(made, monkeypatch, name, why):
    monkeypatch.setattr(registry, "operators", {"test_plus_one": made})
    before = registry.get_policy()
    with pytest.raises(InputError, match=why):
        registry.set_policy(name)
    assert registry.get_policy() == before


def test_choosing_a_provider_that_no_operator_has_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "operators", {})
    with pytest.raises(InputError, match="no operator has a cuda implementation"):
        registry.set_policy("cuda")


def test_describe_gives_every_reason(made):
    assert registry.describe()["test_plus_one"] == {
        "native": {"available": True, "reason": ""},
        "cpp": {"available": True, "reason": ""},
        "triton": {"available": True, "reason": "not measured"},
        "cuda": {"available": False, "reason": "no such device"},
        "apex": {"available": False, "reason": "no implementation of this operator"},
    }
    assert registry.describe()["normalized_mse"]["triton"]["reason"] == "no implementation of this operator"


def test_support_is_checked_once(made):
    for policy in ("auto", "native", "auto"):
        registry.set_policy(policy)
        value(made)
        registry.describe()
    assert made.asked == ["cuda"]


def test_compiled_graph_follows_the_policy(made):
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


def test_checks_and_gradients_of_an_operator(monkeypatch):
    monkeypatch.setattr(registry, "operators", dict(registry.operators))

    def check(factor: float, x: Tensor, strict: bool = True) -> None:
        torch._check(strict and factor > 0, lambda: f"factor {factor} for {list(x.shape)}")

    @registry.operator(checks=(check,))
    def test_scaled(x: Tensor, name: str, scale: Tensor | None, factor: float = 2.0) -> Tensor:
        """x * factor, whose gradient is given for scale also, even if it is None."""
        return x * factor

    def backward(ctx, grad):
        return grad * ctx.factor, None, torch.zeros(())

    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[3]

    test_scaled.register_autograd(backward, setup_context)
    x = torch.ones(3, requires_grad=True)
    for call in (test_scaled, torch.ops.dspnet.test_scaled):
        (gradient,) = torch.autograd.grad(call(x, "", None, 4.0).sum(), x)
        assert gradient.tolist() == [4, 4, 4]
    for call in (test_scaled, test_scaled.native, torch.ops.dspnet.test_scaled):
        with pytest.raises(RuntimeError, match=r"factor -1.0 for \[3\]"):
            call(x, "", None, factor=-1.0)
    assert test_scaled.native(x.detach(), "", None).tolist() == [2, 2, 2]


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
            ["cudo", "unknown kernel provider 'cudo': use auto, any, native, cpp, triton, cuda, apex", "cudo"],
        ),
    ],
)
def test_policy_from_the_environment_and_fast_kernels(run_python, variable, printed):
    assert run_python("-c", ENVIRONMENT, DSPNET_KERNELS=variable).splitlines() == printed
