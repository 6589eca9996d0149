"""Several ranks train as one does: the same weights, one gradient collective a step, the same bits after a resume."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dspnet_fast.errors import InputError
from train.config import PretrainConfig
from train.pretrain import _main
from train.ranks import Ranks
from train.run import checkpoint
from train.run.rundir import read_config
from train.trainer import build_model

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")

# Ends as train.pretrain does, and says on rank 0 how large the all-reduces of the run were.
COUNTING = """
import collections, os, sys
import torch.distributed as dist
from train import pretrain

sizes, all_reduce = collections.Counter(), dist.all_reduce

def counting(tensor, *args, **kwargs):
    sizes[tensor.numel()] += 1
    return all_reduce(tensor, *args, **kwargs)

dist.all_reduce = counting
pretrain._main(sys.argv[1:])
if os.environ["RANK"] == "0":
    print("all-reduces", dict(sizes))
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(ranks, arguments): the command that pretrains on so many Gloo ranks."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def command(ranks, arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*launcher, str(tmp_path / "counting.py"), *arguments]

    return command


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(command) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(state: dict) -> torch.Tensor:
    """All online weights and the target's, not the statistics."""
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith((".weight", ".bias"))])


def final(out) -> dict:
    return checkpoint.load(checkpoint.newest_of_run(out))["model"]


@pytest.mark.parametrize(("ranks", "momentum_bn"), [(2, "on"), (4, "off")])
def test_same_weights_as_one_rank(torchrun, arguments, tmp_path, ranks, momentum_bn):
    """The family drops blocks, so some parameters have no gradient in some steps."""
    options = {"bn_groups": 4, "momentum_bn": momentum_bn, "base_lr": 1.0, "subnets_per_step": 2, "epochs": 2}
    options |= {
        "batch_size": 40
    }  # ten images to a group: of two, normalised features are signs, and rounding flips them
    printed = run(torchrun(ranks, arguments(**options, out=tmp_path / "ranks")))
    assert f", {ranks} ranks" in printed
    _main(arguments(**options, out=tmp_path / "one"))
    together, alone = weights(final(tmp_path / "ranks")), weights(final(tmp_path / "one"))
    config = read_config(tmp_path / "one", PretrainConfig)
    start = weights(build_model(config).state_dict())
    assert (together - alone).norm() <= 1e-3 * (alone - start).norm()
    metrics = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("ranks", "one")]
    for ours, theirs in zip(*metrics, strict=True):
        for name, loss in json.loads(ours).get("loss", {}).items():
            assert loss == pytest.approx(json.loads(theirs)["loss"][name], rel=1e-3)
    counted = eval(printed.split("all-reduces ")[1].splitlines()[0])  # noqa: S307  (what this test printed)
    parameters = max(counted)
    assert parameters >= sum(p.numel() for p in build_model(config).online.parameters())
    assert counted[parameters] == 4  # steps


def test_preempted_ranks_save_and_go_on_bit_for_bit(torchrun, arguments, tmp_path):
    options = {"epochs": 4, "checkpoint_epochs": 0, "probe_epochs": 0, "log_steps": 1, "warmup_epochs": 0}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        torchrun(2, arguments(**options, out=stopped)),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    step = checkpoint.latest_step(stopped / "checkpoints")
    assert 0 < step < 40
    run(torchrun(2, ["--resume", "--out", str(stopped)]))
    run(torchrun(2, arguments(**options, out=whole)))
    for name, value in final(whole).items():
        assert torch.equal(final(stopped)[name], value), name


def test_parts_that_ranks_cannot_share_are_refused(small):
    with pytest.raises(InputError, match="cannot share"):
        build_model(small(bn_groups=2), Ranks(0, 4))
    with pytest.raises(InputError, match="equal parts"):
        small(bn_groups=3)


def test_one_rank_needs_no_group(small):
    assert build_model(small()).groups == 1
    assert build_model(small(bn_groups=4)).groups == 4
    assert build_model(small(bn_groups=4), Ranks(1, 2)).groups == 2
