"""Each test runs in both formulations: plain PyTorch, and the operators' native bodies."""

from collections.abc import Callable

import pytest


@pytest.fixture(params=["eager", "native"], autouse=True)
def formulation(request: pytest.FixtureRequest, policy: Callable[[str], None]) -> str:
    """The policy of the test."""
    policy(request.param)
    return request.param
