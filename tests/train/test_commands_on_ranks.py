"""Every command under torchrun with two processes: ranks share the features, or rank 0 refuses in one line."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dspnet_fast.errors import InputError
from tests.commands import run as run_command
from train import cli
from train.distributed.process_group import World, init_process_group, refuse_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")

BATCH = 7  # images; it neither divides the images nor gives both ranks as many
# Runs several commands in one process, because starting Python takes seconds.
PROGRAM = f"""
import importlib, os, sys
import train.embed, train.evaluation.pretrained
train.embed.BATCH = train.evaluation.pretrained.BATCH = {BATCH}
for line in sys.argv[1].strip().splitlines():
    module, *argv = line.split()
    try:
        importlib.import_module(module).main(argv)
    except SystemExit as ended:
        print(f"rank {{os.environ.get('RANK')}} ended {{module}} with {{ended.code}}", file=sys.stderr, flush=True)
"""


def run(*command):
    """Run a Python program in two processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_two_ranks_give_the_files_of_one(trained, images, masked, tmp_path, monkeypatch):
    alone = shutil.copytree(trained, tmp_path / "alone")
    commands = f"""
    train.evaluate knn OUT --device cpu --workers 0 --k 5 --baselines
    train.evaluate linear OUT --device cpu --workers 0 --epochs 2
    train.evaluate semi OUT --device cpu --workers 0 --epochs 2 --shares 50 --methods linear
    train.evaluate dense OUT --device cpu --workers 0 --epochs 2 --data {masked}
    train.embed OUT --device cpu --workers 0 --data {images} --out OUT/features.npy
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = run(tmp_path / "program.py", commands.replace("OUT", str(trained)))
    assert ended.returncode == 0 and ended.stderr.count(" with 0\n") == 5 * 2, ended.stderr
    assert ended.stdout.count("knn.json, knn.md") == 1, "rank 0 alone prints"
    for module in ("train.embed", "train.evaluation.pretrained"):
        monkeypatch.setattr(f"{module}.BATCH", BATCH)
    for line in commands.replace("OUT", str(alone)).strip().splitlines():
        module, *argv = line.split()
        assert run_command(importlib.import_module(module), *argv) == cli.DONE
    for name in ("knn", "linear", "semi", "dense"):
        found, expected = (json.loads((out / "evaluation" / f"{name}.json").read_text()) for out in (trained, alone))
        assert found == expected
    for path in [*sorted((alone / "features").glob("*.npy")), alone / "features.npy"]:
        np.testing.assert_array_equal(np.load(trained / path.relative_to(alone)), np.load(path))


@pytest.mark.parametrize("module", ["finetune", "detect", "compare", "export", "report", "select"])
def test_commands_of_one_process_refuse_ranks(module, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run_command(importlib.import_module(f"train.{module}"), "OUT") == cli.WRONG_INPUT
    reason = "this command runs in one process, and torchrun started 2: start it without torchrun"
    assert capsys.readouterr().err == f"error: {reason}\n"


def test_other_ranks_than_rank_0_refuse_without_a_message(monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        refuse_ranks("this command runs in one process")
    assert ended.value.code == cli.WRONG_INPUT and capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", [["linear", "OUT", "--augment"], ["semi", "OUT"]])
def test_protocols_that_train_networks_refuse_ranks(argv, monkeypatch):
    evaluate = importlib.import_module("train.evaluate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="runs in one process, and torchrun started 2"):
        evaluate._main(argv)


def test_torchrun_shows_a_refusal_once(tmp_path):
    ended = run("-m", "train.export", tmp_path)
    assert ended.stderr.count("this command runs in one process, and torchrun started 2") == 1, ended.stderr
    assert re.search(r"exitcode +: 2 ", ended.stderr), "torchrun names rank 0's code"


def test_one_process_gathers_its_own_items():
    assert list(World().gather_in_order(iter("abc"), 3)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT missing: start several processes with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT missing"),
    ],
)
def test_incomplete_variables_of_torchrun_raise_input_error(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        init_process_group(torch.device("cpu"))
