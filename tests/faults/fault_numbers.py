"""Batches that are not numbers."""

import json

from fault_lab import Lab
from fault_table import Outcome, fault

# Before the command: what these steps are given is NaN.
SPOILT = """
from train.data.loader import prepare
from train.trainer import Trainer

train_step, calls = Trainer.train_step, 0

def spoilt(self, batch, *args, **kwargs):
    global calls
    calls += 1
    if {first} <= calls <= {last}:
        batch = prepare(batch, self.device) * float("nan")
    return train_step(self, batch, *args, **kwargs)

Trainer.train_step = spoilt
"""


@fault("a batch whose gradients are not finite")
def once(lab: Lab) -> Outcome:
    return Outcome(*lab.start(SPOILT.format(first=5, last=5)).end())


@fault("three such batches in a row")
def for_ever(lab: Lab) -> Outcome:
    outcome = Outcome(*lab.start(SPOILT.format(first=5, last=10_000)).end(), go_on=lab.resume)
    dump = json.loads((lab.seen / "nonfinite.json").read_text())
    assert all(word in json.dumps(dump) for word in ("subnet", "layer", "batch"))
    return outcome
