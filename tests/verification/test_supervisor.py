"""The supervisor: outcomes of workers that stop, fail, or run out of time or memory."""

import pytest
import torch

from dspnet_fast.ops import registry
from dspnet_fast.verification import supervisor
from dspnet_fast.verification.calls import Call, Layout
from dspnet_fast.verification.supervisor import OutOfMemory, verify

VECTOR = Layout((5,), (1,), 0, torch.float32)
CALLS = [Call(name, (VECTOR,)) for name in ("test_one", "test_three", "test_two")]


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    """Three operators with the provider cpp."""
    monkeypatch.setattr(registry, "operators", {})
    for name in ("test_one", "test_three", "test_two"):

        def body(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        body.__name__ = name
        made = registry.operator()(body)
        made.provider("cpp", devices=("cpu",))(lambda *args: args[0] + 1)


@pytest.fixture
def workers(monkeypatch):
    """workers(scripts): the lines of each worker; a string ends it with this failure, None lets it hang."""

    def start(*scripts):
        jobs, remaining = [], iter(scripts)

        class Scripted:
            def __init__(self, module, cases, device, plugins):
                self.lines = [{"ready": True}, *next(remaining)]
                jobs.append(sorted(cases))

            def read(self, seconds):
                line = self.lines.pop(0)
                if line is None:
                    raise TimeoutError
                self.reason = line
                return None if isinstance(line, str) else line

            def failure(self):
                return self.reason

            def __enter__(self):
                return self

            def __exit__(self, *args):
                pass

        monkeypatch.setattr(supervisor, "Worker", Scripted)
        return jobs

    return start


def passing(number):
    return [{"begins": number}, {"done": number, "problem": "", "error": 0.25}]


def outcomes(**options):
    found = verify(CALLS, torch.device("cpu"), **options)
    return {name: (o.verified, o.reason) for name, by in found.items() for o in by.values()}


def test_all_pass(workers):
    jobs = workers([*passing(0), *passing(1), *passing(2), {"stopped": 2}])
    assert verify(CALLS, torch.device("cpu"))["test_two"]["cpp"].error == 0.25
    assert jobs == [[0, 1, 2]]


def test_others_continue_after_a_crash_and_a_timeout(workers):
    jobs = workers([{"begins": 0}, "SIGSEGV ended the process"], [{"begins": 1}, None], [*passing(2), {"stopped": 2}])
    assert outcomes(call_seconds=7) == {
        "test_one": (False, "SIGSEGV ended the process (x 5)"),
        "test_three": (False, "no result within 7 s (x 5)"),
        "test_two": (True, ""),
    }
    assert jobs == [[0, 1, 2], [1, 2], [2]]


def test_worker_that_stops_after_an_exception_is_followed_by_another(workers):
    raised = {"done": 0, "problem": "it raised RuntimeError: illegal", "error": 0.0}
    jobs = workers([{"begins": 0}, raised, {"stopped": 0}], [*passing(1), *passing(2), {"stopped": 2}])
    assert [verified for verified, _ in outcomes().values()] == [False, True, True]
    assert jobs == [[0, 1, 2], [1, 2]]


def test_worker_that_fails_between_calls_refuses_what_was_not_verified(workers):
    workers([*passing(0), "the process ended with exit code 1: no memory"])
    reason = "the verifying process failed: the process ended with exit code 1: no memory"
    assert outcomes() == {"test_one": (True, ""), "test_three": (False, reason), "test_two": (False, reason)}


def test_time_limit_refuses_what_was_not_verified(workers, monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 1.0, 1.0, 99.0, 99.0])
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: next(clock))
    workers([*passing(0), {"begins": 1}, None])
    reason = "not verified within the time limit"
    assert outcomes(seconds=10) == {"test_one": (True, ""), "test_three": (False, reason), "test_two": (False, reason)}


def test_provider_that_accepts_no_call_is_refused(workers):
    declined = [{"begins": 0}, {"done": 0, "declined": "it supports float64"}]
    workers([*declined, *passing(1), *passing(2), {"stopped": 2}])
    assert outcomes()["test_one"] == (False, "it accepts none of the calls: it supports float64")


def test_lack_of_memory_is_raised(workers):
    workers([{"begins": 0}, {"out_of_memory": True}])
    with pytest.raises(OutOfMemory):
        outcomes()
