"""More of what the table's first row runs: a run that is killed again and again ends as one that is not."""

import random

import pytest
from fault_lab import Lab, assert_same_run
from fault_stops import POINTS, killed

ANY = 0.3  # seconds within which any moment may be the last

CHAINS = {
    "half written, before sync": [*POINTS[:2], None, None],
    "around the rename": [*POINTS[2:4], None, None],
    "before the old one is dropped": [POINTS[4], None, None, None],
    "five times in training": [None] * 5,
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_killed_again_and_again(lab: Lab, chain: str) -> None:
    killed(lab, [moment or random.uniform(0, ANY) for moment in CHAINS[chain]])
    assert_same_run(lab.seen, lab.whole)
