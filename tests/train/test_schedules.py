"""Schedules compared with their formulas."""

import math

import pytest

from train.run.schedules import learning_rate, momentum_alpha, target_tau


def test_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 100, 10, 0.4) for step in range(101)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 90)) for k in range(91)])
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert learning_rate(0, 10, 0, 0.4) == pytest.approx(0.4)


def test_learning_rate_of_warm_up_only():
    assert [learning_rate(step, 4, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_tau_rises_from_start_to_one():
    assert target_tau(0, 50, 0.996) == pytest.approx(0.996)
    assert target_tau(25, 50, 0.996) == pytest.approx(0.998)
    assert target_tau(50, 50, 0.996) == 1
    assert target_tau(10, 50, 0.9) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 5) + 1) / 2)


def test_alpha_falls_from_one_to_zero():
    assert [momentum_alpha(step, 4) for step in range(5)] == pytest.approx(
        [1, (math.sqrt(0.5) + 1) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    )
