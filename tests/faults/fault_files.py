"""Damaged checkpoints, checkpoints of other runs, and an --out that is a file."""

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from fault_lab import Lab
from fault_table import Outcome, fault

from train.config import PretrainConfig
from train.pretraining.dspnet import build_model
from train.run import checkpoint
from train.run.saved_config import read_config

STOPPED_AT = 8


def stopped(lab: Lab, step: int = STOPPED_AT) -> Path:
    """Stop a run after checkpoints at step 6 and at `step`; return the newest."""
    process = lab.start(pause_at=step)
    lab.paused()
    process.send(signal.SIGTERM)
    lab.go()
    printed, code = process.end()
    assert code == 0, printed
    newest = checkpoint.latest(lab.checkpoints)
    assert newest is not None and checkpoint.latest_step(lab.checkpoints) == step
    return newest


def damaged(lab: Lab, damage: Callable[[Path], object]) -> Outcome:
    damage(stopped(lab))
    return Outcome(*lab.start(resume=True).end())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@fault("the newest checkpoint is truncated")
def truncated(lab: Lab) -> Outcome:
    return damaged(lab, truncate)


@fault("one bit of the newest checkpoint is flipped")
def bit_flipped(lab: Lab) -> Outcome:
    return damaged(lab, flip)


@fault("all checkpoints are damaged")
def all_damaged(lab: Lab) -> Outcome:
    stopped(lab)
    for path in lab.checkpoints.iterdir():
        truncate(path)

    def start_again() -> None:
        for path in lab.checkpoints.iterdir():
            path.unlink()
        lab.resume()

    return Outcome(*lab.start(resume=True).end(), go_on=start_again)


class Code:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@fault("a checkpoint is replaced by a file with executable code")
def executable_code(lab: Lab) -> Outcome:
    trace = lab.folder / "executed"
    pickle.loads(pickle.dumps(Code(trace)))
    assert trace.exists()  # unrestricted unpickling executes it
    trace.unlink()
    outcome = damaged(lab, lambda newest: newest.write_bytes(pickle.dumps(Code(trace))))
    assert not trace.exists()
    return outcome


def add_checkpoint(lab: Lab, state: Callable[[dict], dict]) -> Outcome:
    """Add a newer checkpoint with another state; continuing removes it."""
    newest = checkpoint.load(stopped(lab))
    other = checkpoint.save(lab.checkpoints, STOPPED_AT + 1, state(newest), keep=9)

    def remove_it() -> None:
        other.unlink()
        lab.resume()

    return Outcome(*lab.start(resume=True).end(), go_on=remove_it)


@fault("a checkpoint of another network")
def another_network(lab: Lab) -> Outcome:
    def state(newest: dict) -> dict:
        config = read_config(lab.seen, PretrainConfig)
        config.dns = "c8-d2222"
        return {"model": build_model(config).state_dict(), "momentum": newest["momentum"]}

    return add_checkpoint(lab, state)


@fault("a checkpoint with weights of other shapes")
def other_weights(lab: Lab) -> Outcome:
    def state(newest: dict) -> dict:
        config = read_config(lab.seen, PretrainConfig)
        config.hidden_features *= 2
        return {"model": build_model(config).state_dict(), "momentum": newest["momentum"]}

    return add_checkpoint(lab, state)


@fault("a checkpoint with momentum of other shapes")
def other_momentum(lab: Lab) -> Outcome:
    def state(newest: dict) -> dict:
        name = next(name for name, value in newest["momentum"].items() if value.ndim == 4)
        return {**newest, "momentum": {**newest["momentum"], name: torch.zeros(1)}}

    return add_checkpoint(lab, state)


@fault("`--out` is a file")
def out_is_a_file(lab: Lab) -> Outcome:
    lab.out.write_text("notes")
    printed, code = lab.start().end()
    assert lab.out.read_text() == "notes"

    def elsewhere() -> None:
        lab.out.unlink()
        lab.run()

    return Outcome(printed, code, elsewhere)
