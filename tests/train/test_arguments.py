"""Wrong arguments are errors of one line that name what was meant."""

import importlib

import pytest

from dspnet_fast.errors import InputError
from tests.commands import run
from train import cli

CASES = {
    "pretrain --epochs many": "--epochs many: expected a whole number",
    "pretrain --base-lr fast": "--base-lr fast: expected a number",
    "pretrain --train-images x": "--train-images x: expected a whole number",
    "pretrain --workers some": "--workers some: expected a whole number or auto",
    "pretrain --baselr 3": "unknown option --baselr: did you mean --base-lr?",
    "pretrain --base-l 3": "unknown option --base-l: did you mean --base-lr?",
    "pretrain --zzz=3": "unknown option --zzz: dspnet-pretrain --help lists all",
    "pretrain photos": "'photos' is one argument too many: see dspnet-pretrain --help",
    "export": "OUT missing: see dspnet-export --help",
    "evaluate knn OUT --kk 3": "unknown option --kk: did you mean --k?",
    "evaluate some OUT": "argument protocol: invalid choice: 'some' (choose from 'knn', 'linear', 'semi')",
    "finetune --no-distilation": "unknown option --no-distilation: did you mean --no-distillation?",
}


@pytest.mark.parametrize("line", CASES)
def test_wrong_arguments_are_one_line(line):
    command, *argv = line.split()
    with pytest.raises(InputError) as problem:
        importlib.import_module(f"train.{command}")._main(argv)
    assert str(problem.value) == CASES[line]


def test_command_prints_the_line_without_usage(capsys):
    assert run(importlib.import_module("train.pretrain"), "--baselr", "3") == cli.WRONG_INPUT
    assert capsys.readouterr().err == "error: unknown option --baselr: did you mean --base-lr?\n"
