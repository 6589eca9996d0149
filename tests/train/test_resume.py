"""Resuming: an interrupted run ends with the same bits as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import yaml

from dspnet_fast.errors import InputError
from tests.interruption import stop_after
from train.pretrain import _main
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer
from train.run import checkpoint
from train.run.run_directory import open_run

EPOCH_STEPS = 10  # 80 images in batches of 8


def final_state(out):
    return checkpoint.load(checkpoint.newest_of_run(out))


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys() and actual["step"] == expected["step"]
    for part in ("model", "momentum"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def learning_rates(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


@pytest.mark.parametrize(("stop_at", "workers"), [(1, 2), (3, 0), (13, 2)])
def test_resume_after_ctrl_c_is_exact(small, tmp_path, finished, stop_at, workers):
    assert isinstance(stop_after(small(workers=workers), stop_at), KeyboardInterrupt)
    assert final_state(tmp_path / "run")["step"] == stop_at
    _main(["--resume", "--out", str(tmp_path / "run")])
    assert_same_bits(final_state(tmp_path / "run"), final_state(finished))
    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_resume_after_preemption_is_exact(small, tmp_path, finished, number):
    ended = stop_after(small(), 5, number)
    assert isinstance(ended, SystemExit) and ended.code == 0
    assert final_state(tmp_path / "run")["step"] == 5
    _main(["--resume", "--out", str(tmp_path / "run")])
    assert_same_bits(final_state(tmp_path / "run"), final_state(finished))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_resume_from_the_checkpoint_before_a_damaged_one_is_exact(small, tmp_path, finished, damage, capsys):
    stop_after(small(checkpoint_epochs=2 / EPOCH_STEPS), 5)
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    _main(["--resume", "--out", str(tmp_path / "run")])
    assert f"{newest.name}" in capsys.readouterr().out
    assert_same_bits(final_state(tmp_path / "run"), final_state(finished))
    assert losses(tmp_path / "run") == losses(finished)


def test_resume_after_a_kill_within_an_epoch_is_exact(arguments, small, tmp_path):
    epochs, out = 8, tmp_path / "run"
    command = [sys.executable, "-m", "train.pretrain", *arguments(checkpoint_epochs=0.3, epochs=epochs)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # results depend on the number of threads
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=threads)
    deadline = time.monotonic() + 120
    while not (steps := sorted((out / "checkpoints").glob("step-*.pt"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run must not have ended before the kill"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    newest = checkpoint.latest(out / "checkpoints")
    assert steps and newest is not None and int(newest.stem[5:]) % EPOCH_STEPS, "the checkpoint is within an epoch"
    _main(["--resume", "--out", str(out)])
    config = small(out=str(tmp_path / "uninterrupted"), checkpoint_epochs=0.3, epochs=epochs)
    PretrainRun(config, resume=False).run()
    assert_same_bits(final_state(out), final_state(tmp_path / "uninterrupted"))
    assert losses(out) == losses(tmp_path / "uninterrupted")


def test_resume_without_a_checkpoint_starts_from_the_beginning(small, tmp_path, finished):
    PretrainRun(small(), resume=False)  # creates the run directory without training
    _main(["--resume", "--out", str(tmp_path / "run")])
    assert_same_bits(final_state(tmp_path / "run"), final_state(finished))


def test_finished_run_continues_with_more_epochs_at_their_schedules(small, tmp_path, capsys):
    out = tmp_path / "run"
    PretrainRun(small(epochs=1), resume=False).run()
    capsys.readouterr()
    _main(["--resume", "--out", str(out), "--epochs", "2"])
    rates = learning_rates(out)
    longer = Trainer(small(epochs=2), EPOCH_STEPS, torch.device("cpu"))
    assert rates[EPOCH_STEPS:] == [longer.learning_rate(step) for step in range(EPOCH_STEPS, 2 * EPOCH_STEPS)]
    assert rates[EPOCH_STEPS - 1] < 0.2 * rates[EPOCH_STEPS], "the cosine of one epoch had ended"
    said = "raised from 1 to 2 epochs: all schedules continue as in a run of 2 epochs at this step; learning rate "
    assert f"{said}{rates[EPOCH_STEPS]:.4g}" in capsys.readouterr().out
    assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 2
    with pytest.raises(InputError, match="another --epochs"):
        _main(["--resume", "--out", str(out), "--epochs", "1"])


def test_resume_drops_incomplete_and_later_metrics(small, tmp_path):
    PretrainRun(small(epochs=1), resume=False).run()
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = losses(tmp_path / "run")
    with open(metrics, "a") as file:
        file.write('{"step": 99, "loss": {}}\n{"step": 10, "lo')
    _main(["--resume", "--out", str(tmp_path / "run")])
    assert losses(tmp_path / "run") == whole


def test_number_of_workers_changes_no_bit(small, tmp_path, finished):
    PretrainRun(small(workers=2), resume=False).run()
    assert_same_bits(final_state(tmp_path / "run"), final_state(finished))


def test_checkpoint_has_momentum_and_target_statistics(finished):
    state = final_state(finished)
    kept = {name: value for name, value in state["model"].items() if name.startswith("target.") and "running" in name}
    assert kept and all(value.isfinite().all() for value in kept.values())
    assert state["model"]["target.encoder.bn1.num_batches_tracked"] == 2 * EPOCH_STEPS
    momentum = {f"online.{name}": value for name, value in state["momentum"].items()}
    assert all(value.count_nonzero() and value.shape == state["model"][name].shape for name, value in momentum.items())
    assert len(momentum) == sum(name.endswith(("weight", "bias")) for name in state["model"] if "online" in name)


def test_checkpoint_with_missing_momentum_is_refused(small, finished):
    trainer = Trainer(small(), EPOCH_STEPS, torch.device("cpu"))
    state = final_state(finished)
    with pytest.raises(InputError, match="predictor.* is missing"):
        trainer.load_state({**state, "momentum": {n: m for n, m in state["momentum"].items() if "predictor" not in n}})
    with pytest.raises(InputError, match="is missing"):
        trainer.load_state({name: part for name, part in state.items() if name != "momentum"})


def test_run_directory_has_one_writer(small, tmp_path):
    config = small(out=str(tmp_path / "run"))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, json; from train.config import PretrainConfig; from train.run.run_directory import open_run\n"
            "open_run(PretrainConfig(**json.loads(sys.argv[1])), False); print('open', flush=True); sys.stdin.read()",
            json.dumps(asdict(config)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is writing to the run"):
            open_run(config, resume=True)
    finally:
        holder.kill()
        holder.communicate()
    open_run(config, resume=True)
    open_run(config, resume=True)  # the same process may open it again
