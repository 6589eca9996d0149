"""What all tests share. A test that wants Triton, interpreted or compiled, starts a process of its own for it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it; DSPNET_TEST_SEED draws others."""
    torch.manual_seed(int(os.environ.get("DSPNET_TEST_SEED", "0")))


THREADS = torch.get_num_threads()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Operators are tested with all threads, everything else with one: test processes share the cores, and threads
    that wait for each other make a millisecond's work take a second there."""
    torch.set_num_threads(THREADS if "ops" in item.path.parts else 1)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty gives NaN instead of whatever was there: a kernel that leaves an output unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_python(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Runs Python in a process of its own, in the repository root, and returns what it printed.

    run_python(*arguments, **environment): an environment variable given as None is unset.
    """
    patience = 3600 if request.node.get_closest_marker("slow") else 600  # seconds

    def run(*arguments: str, **environment: str | None) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={name: value for name, value in env.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=patience,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def policy() -> Iterator[Callable[[str], None]]:
    """Sets the kernel policy for one test."""
    from dspnet_fast.ops import registry

    before = registry.get_policy()
    yield registry.set_policy
    registry.set_policy(before)
