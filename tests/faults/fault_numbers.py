"""Batches that are not numbers."""

import json

from fault_lab import Lab
from fault_table import Outcome, fault

# Before the command: these batches are NaN.
SPOILT = """
from train.run.meter import Meter

batches = Meter.batches

def spoilt(self):
    for number, batch in enumerate(batches(self), start=1):
        yield batch * float("nan") if {first} <= number <= {last} else batch

Meter.batches = spoilt
"""


@fault("a batch whose gradients are not finite")
def once(lab: Lab) -> Outcome:
    return Outcome(*lab.start(SPOILT.format(first=5, last=5)).end())


@fault("three such batches in a row")
def for_ever(lab: Lab) -> Outcome:
    outcome = Outcome(*lab.start(SPOILT.format(first=5, last=10_000)).end(), go_on=lab.resume)
    dump = json.loads((lab.seen / "nonfinite.json").read_text())
    (rank,) = dump["ranks"]
    assert rank["found"] == {"subnet": "all", "layer": "the images", "where": "images"} and len(rank["batch"]) == 4
    return outcome
