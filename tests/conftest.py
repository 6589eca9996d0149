"""Fixtures of all tests. Tests of Triton, interpreted or compiled, start a new process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when PyTorch is imported, also by the processes that tests start. Test processes share the cores: a thread that
# waits for another one shall sleep, and not spin on the core that the other one needs.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest  # noqa: E402
import torch  # noqa: E402

# Shells start background jobs without job control with SIGINT ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed every test, by DSPNET_TEST_SEED or 0."""
    torch.manual_seed(int(os.environ.get("DSPNET_TEST_SEED", "0")))


THREADS = torch.get_num_threads()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Test operators with all threads and everything else with one: test processes share the cores, and threads that
    wait for each other would slow small operations a thousandfold."""
    torch.set_num_threads(THREADS if "ops" in item.path.parts else 1)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty returns NaN, so that outputs a kernel left unwritten are found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_python(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Run Python in a new process, in the repository root, and return its output.

    run_python(*arguments, **environment): an environment variable of None is unset.
    """
    timeout = 3600 if request.node.get_closest_marker("slow") else 600  # seconds

    def run(*arguments: str, **environment: str | None) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={name: value for name, value in env.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def policy() -> Iterator[Callable[[str], None]]:
    """Set the kernel policy for one test."""
    from dspnet_fast.ops import registry

    before = registry.get_policy()
    yield registry.set_policy
    registry.set_policy(before)
