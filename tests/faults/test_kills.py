"""More variants of the table's first row: a run that is killed repeatedly ends with the bits of one without faults."""

import random

import pytest
from fault_lab import Lab, assert_same_run
from fault_stops import POINTS, killed

LONGEST = 0.3  # seconds of training before a kill

CHAINS = {
    "half written, before sync": [*POINTS[:2], None, None],
    "around the rename": [*POINTS[2:4], None, None],
    "before the old one is dropped": [POINTS[4], None, None, None],
    "five times in training": [None] * 5,
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_run_killed_repeatedly_ends_with_the_same_bits(lab: Lab, chain: str) -> None:
    killed(lab, [moment or random.uniform(0, LONGEST) for moment in CHAINS[chain]])
    assert_same_run(lab.seen, lab.whole)
