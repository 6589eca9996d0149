"""docs/faults.md is correct: the tests produce the fault of every row of its table, and every fault has a row."""

import fault_disk  # noqa: F401  (registers its faults, as do the others)
import fault_files  # noqa: F401
import fault_images  # noqa: F401
import fault_numbers  # noqa: F401
import fault_ranks  # noqa: F401
import fault_stops  # noqa: F401
import pytest
from fault_lab import Lab, assert_finished, assert_same_run, losses
from fault_table import RUNNERS, SLOW, Outcome, Row, pattern, rows

from dspnet_fast.errors import InputError
from train.run import checkpoint


def nothing(lab: Lab, outcome: Outcome) -> None:
    """The newest checkpoint has all trained steps."""
    trained = losses(lab.seen)
    assert checkpoint.latest_step(lab.checkpoints) >= (trained[-1][0] if trained else 0)
    outcome.go_on()
    assert_same_run(lab.seen, lab.whole)


def steps_since(lab: Lab, outcome: Outcome) -> None:
    """A checkpoint exists from which the run continues."""
    assert checkpoint.latest_step(lab.checkpoints) > 0
    outcome.go_on()
    assert_same_run(lab.seen, lab.whole)


def all_steps(lab: Lab, outcome: Outcome) -> None:
    """No checkpoint can be read."""
    for path in lab.checkpoints.iterdir():
        with pytest.raises(InputError):
            checkpoint.load(path)
    outcome.go_on()
    assert_same_run(lab.seen, lab.whole)


def some_training(lab: Lab, outcome: Outcome) -> None:
    """The run ends, with other weights."""
    outcome.go_on()
    assert_finished(lab.seen)


CHECKS = {
    "nothing": nothing,
    "the steps since the newest intact checkpoint": steps_since,
    "all steps": all_steps,
    "that image": some_training,
    "that step": some_training,
    "those three steps": some_training,
}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.fault, marks=[pytest.mark.slow] * (row.fault in SLOW)) for row in rows()]
)
def test_fault_has_the_documented_result(row: Row, lab: Lab) -> None:
    outcome = RUNNERS[row.fault](lab)
    for message in row.messages:
        assert message.search(outcome.printed), f"{message.pattern} is not in\n{outcome.printed}"
    assert outcome.code == row.code, outcome.printed
    CHECKS[row.lost](lab, outcome)


def test_table_and_registered_faults_match():
    names = [row.fault for row in rows()]
    assert sorted(names) == sorted(RUNNERS)
    assert all(row.messages for row in rows())


def test_pattern_matches_literally_except_for_numbers_and_gaps():
    message = pattern("stopped after step N of N (…): --out …, N.")
    assert message.search("then: stopped after step 12 of 20 (a signal): --out runs/1, 3.")
    assert not message.search("stopped after step N of 20 (a signal): --out runs/1, 3.")
    assert not message.search("stopped after step 12 of 20 (a\nsignal): --out runs/1, 3.")
    assert not message.search("stopped after step 12 of 20 (a signal): --out runs/1, 3!")
