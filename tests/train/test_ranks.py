"""Training on several ranks: weights of one rank, one gradient all-reduce per step, exact resuming."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dspnet_fast.errors import InputError
from dspnet_fast.nn.batch_norm import SlimBatchNorm
from train.config import PretrainConfig
from train.distributed.batch_split import BatchSplit, split_batch
from train.pretraining.dspnet import VIEWS, build_model
from train.pretraining.flat_buffers import FlatBuffers
from train.pretraining.trainer import Trainer
from train.run import checkpoint
from train.run.saved_config import read_config

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")

# Runs train.pretrain and prints the sizes of the all-reduces on rank 0. DOUBLE computes in float64, so that differences
# by the order of sums stay far below real errors.
COUNTING = """
import collections, os, sys
import torch
import torch.distributed as dist
from train import pretrain
from train.pretraining import trainer

if "DOUBLE" in os.environ:
    torch.set_default_dtype(torch.float64)
    prepare = trainer.prepare
    trainer.prepare = lambda batch, device: prepare(batch, device).double()

sizes, all_reduce = collections.Counter(), dist.all_reduce

def counting(tensor, *args, **kwargs):
    sizes[tensor.numel()] += 1
    return all_reduce(tensor, *args, **kwargs)

dist.all_reduce = counting
pretrain._main(sys.argv[1:])
if os.environ.get("RANK", "0") == "0":
    print("all-reduces", dict(sizes))
"""


# Rank 1 reads another checkpoint than rank 0.
OTHER_CHECKPOINT = """
import os, sys
from train import pretrain
from train.run import checkpoint

load = checkpoint.load

def other(*args):
    state = load(*args)
    next(iter(state["model"].values())).add_(1e-3)
    return state

if os.environ["RANK"] == "1":
    checkpoint.load = other
pretrain.main(sys.argv[1:])
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(ranks, arguments): the command that pretrains on several Gloo ranks."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def command(ranks, arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*launcher, str(tmp_path / "counting.py"), *arguments]

    return command


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(command, **environment) -> str:
    done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(state: dict) -> torch.Tensor:
    """Weights and running statistics of the online and target network, as one tensor."""
    return torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])


def final(out) -> dict:
    return checkpoint.load(checkpoint.newest_of_run(out))["model"]


CASES = {
    "two ranks with two groups each": (2, {"bn_groups": 4}, []),
    "two ranks with two micro-batches each and overlapped all-reduce": (
        2,
        {"bn_groups": 4},
        ["--grad-accum-steps=2", "--overlap-all-reduce"],
    ),
    "four ranks that share two groups": (4, {"bn_groups": 2, "momentum_bn": "off"}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_weights_of_one_rank(torchrun, arguments, tmp_path, case):
    """The subnets omit blocks, so some parameters have no gradient in some steps."""
    ranks, options, flags = CASES[case]
    # ten images per group: normalised features of two images are signs, which rounding flips
    options = {"base_lr": 1.0, "dns": "c8-d1111,c16-d2121", "epochs": 2, "batch_size": 40, "probe_epochs": 0, **options}
    printed = run(torchrun(ranks, [*arguments(**options, out=tmp_path / "ranks"), *flags]), DOUBLE="1")
    assert f", {ranks} ranks" in printed
    run([sys.executable, *torchrun(1, arguments(**options, out=tmp_path / "one"))[5:]], DOUBLE="1")
    together, alone = weights(final(tmp_path / "ranks")), weights(final(tmp_path / "one"))
    config = read_config(tmp_path / "one", PretrainConfig)
    model = build_model(config).double()
    start = weights(model.state_dict())
    assert (together - alone).norm() <= 1e-9 * (alone - start).norm()
    metrics = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("ranks", "one")]
    for ours, theirs in zip(*metrics, strict=True):
        for name, loss in json.loads(ours).get("loss", {}).items():
            assert loss == pytest.approx(json.loads(theirs)["loss"][name], rel=1e-9)
    counted = eval(printed.split("all-reduces ")[1].splitlines()[0])  # noqa: S307  (what this test printed)
    flat = FlatBuffers(model.online, model.target)
    # the heads and the first stages are too small here for separate all-reduces
    early = ["encoder.layer4", "encoder.layer3"] if "--overlap-all-reduce" in flags else []
    bounds = [len(flat.grads), *(flat.start(part) for part in early), 0]
    gradients = [end - start for end, start in itertools.pairwise(bounds)]
    assert {size: counted[size] for size in gradients} == dict.fromkeys(gradients, 4)  # steps
    assert counted[len(flat.statistics)] == 4
    others = {size for size in counted if size not in (*gradients, len(flat.statistics))}
    layers = {module.num_features for module in model.modules() if isinstance(module, SlimBatchNorm)}
    shared = {VIEWS * size for size in layers | {8, 16, 32, 64}}  # channels of the full network and of the smaller ones
    assert others <= {1, 2, 3} | (shared if case == "four ranks that share two groups" else set())


def test_preempted_ranks_save_and_resume_exactly(torchrun, arguments, tmp_path):
    """The first signal is SIGTERM through torchrun, which reaches all processes of all ranks, also image loaders; the
    second is SIGUSR1 to one rank."""
    options = {"epochs": 9, "checkpoint_epochs": 0, "probe_epochs": 0, "log_steps": 1, "warmup_epochs": 0, "workers": 1}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    metrics, step = stopped / "metrics.jsonl", 0
    for receiver in ("torchrun", "one rank"):
        command = torchrun(2, ["--resume", "--out", str(stopped)] if step else arguments(**options, out=stopped))
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 90
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > step) and time.monotonic() < deadline:
            time.sleep(0.02)
        if receiver == "torchrun":
            process.send_signal(signal.SIGTERM)
        else:
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(ranks[1]), signal.SIGUSR1)
        output, errors = process.communicate(timeout=60)
        assert "stopped and saved after step" in output and "error:" not in errors, errors
        if receiver == "one rank":
            assert process.returncode == 0, errors
        before, step = step, checkpoint.latest_step(stopped / "checkpoints")
        assert before < step < 90
    run(torchrun(2, ["--resume", "--out", str(stopped)]))
    run(torchrun(2, arguments(**options, out=whole)))
    for name, value in final(whole).items():
        assert torch.equal(final(stopped)[name], value), name


def test_ranks_with_different_checkpoints_are_refused(torchrun, arguments, tmp_path):
    """Machines without a shared folder read different checkpoints."""
    run([sys.executable, *torchrun(1, arguments(epochs=1, probe_epochs=0, out=tmp_path / "run"))[5:]])
    other = tmp_path / "other.py"
    other.write_text(OTHER_CHECKPOINT)
    resume = ["--resume", "--out", str(tmp_path / "run"), "--batch-size", "8"]
    command = [other if part == str(tmp_path / "counting.py") else part for part in torchrun(2, resume)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "rank 1 starts after step 10 and rank 0 after step 10, or with other weights" in done.stderr


def test_bn_groups_that_do_not_fit_the_ranks_are_refused(small):
    with pytest.raises(InputError, match="--bn-groups 4 does not fit 6 ranks"):
        split_batch(small(bn_groups=4, batch_size=24), 6)
    with pytest.raises(InputError, match="--grad-accum-steps 2: give a multiple of 4"):
        split_batch(small(bn_groups=2, grad_accum_steps=2), 2)
    with pytest.raises(InputError, match="equal groups"):
        small(bn_groups=3)


@pytest.mark.parametrize(
    ("bn_groups", "grad_accum_steps", "ranks", "expected"),
    [
        (None, 1, 1, BatchSplit(1, 1, 1)),
        (None, 2, 4, BatchSplit(2, 1, 1)),
        (4, 1, 1, BatchSplit(1, 4, 1)),
        (4, 1, 2, BatchSplit(1, 2, 1)),
        (4, 2, 2, BatchSplit(2, 1, 1)),
        (1, 1, 8, BatchSplit(1, 1, 8)),
        (2, 1, 8, BatchSplit(1, 1, 4)),
    ],
)
def test_split_batch(small, bn_groups, grad_accum_steps, ranks, expected):
    config = small(batch_size=16, bn_groups=bn_groups, grad_accum_steps=grad_accum_steps)
    assert split_batch(config, ranks) == expected


def test_micro_batches_contain_both_views_of_their_images():
    batch = torch.arange(12).view(12, 1)  # view 1 of images 0 to 5, then view 2
    micro_batches = [part.flatten().tolist() for part in BatchSplit(3, 1, 1).split(batch)]
    assert micro_batches == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    with pytest.raises(InputError, match="--grad-accum-steps 4"):
        list(BatchSplit(4, 1, 1).split(batch))


@pytest.mark.parametrize("momentum_bn", ["on", "off"])
def test_micro_batches_give_the_results_of_bn_groups(small, momentum_bn, monkeypatch):
    """Four micro-batches equal four groups, also in the statistics of momentum batch norm; in float64."""
    views = torch.rand(3, 80, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr("train.pretraining.trainer.build_model", lambda *args: build_model(*args).double())
    results = []
    for accumulate in (1, 2, 4):
        config = small(
            batch_size=40, bn_groups=4, grad_accum_steps=accumulate, momentum_bn=momentum_bn, warmup_epochs=0
        )
        trainer = Trainer(config, 10, torch.device("cpu"))
        losses = [trainer.train_step(batch) for batch in views]
        target = torch.cat([b.flatten() for b in trainer.model.target.buffers() if b.is_floating_point()])
        results.append((weights(trainer.model.state_dict()), target, losses))
    start = weights(build_model(config).state_dict())
    for parameters, statistics, losses in results[1:]:
        assert (parameters - results[0][0]).norm() <= 1e-9 * (results[0][0] - start).norm()
        if momentum_bn == "on":
            torch.testing.assert_close(statistics, results[0][1], rtol=1e-9, atol=1e-11)
        for ours, theirs in zip(losses, results[0][2], strict=True):
            expected = pytest.approx({n: v.item() for n, v in theirs.items()}, rel=1e-9)
            assert {n: v.item() for n, v in ours.items()} == expected
