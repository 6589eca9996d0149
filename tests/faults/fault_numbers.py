"""Non-finite batches."""

import json

from fault_lab import Lab
from fault_table import Outcome, fault

# Executed before the command: these batches are NaN.
NAN_BATCHES = """
from train.run.meter import Meter

batches = Meter.batches

def with_nan(self):
    for number, batch in enumerate(batches(self), start=1):
        yield batch * float("nan") if {first} <= number <= {last} else batch

Meter.batches = with_nan
"""


@fault("a batch with non-finite gradients")
def once(lab: Lab) -> Outcome:
    return Outcome(*lab.start(NAN_BATCHES.format(first=5, last=5)).end())


@fault("three consecutive batches with non-finite gradients")
def from_then_on(lab: Lab) -> Outcome:
    outcome = Outcome(*lab.start(NAN_BATCHES.format(first=5, last=10_000)).end(), go_on=lab.resume)
    dump = json.loads((lab.seen / "nonfinite.json").read_text())
    (rank,) = dump["ranks"]
    assert rank["found"] == {"subnet": "all", "layer": "the images", "where": "images"} and len(rank["batch"]) == 4
    return outcome
