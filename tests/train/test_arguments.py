"""Wrong arguments are errors of one line that suggest a valid one."""

import importlib
import math
from pathlib import Path

import pytest
import yaml

from dspnet_fast import atomic
from dspnet_fast.errors import InputError
from tests.commands import run
from train import cli, detect, pretrain
from train.config import PretrainConfig

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
    "evaluate some OUT": "argument protocol: invalid choice: 'some' (choose from 'knn', 'linear', 'semi', 'dense')",
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": math.nan}, "--base-lr must be a finite number, not nan"),
        ({"stall_timeout": math.inf}, "--stall-timeout must be a finite number, not inf"),
        ({"train_images": 0}, "--train-images must be at least 1, not 0"),
        ({"full_only_epochs": -1.0}, "--full-only-epochs must be at least 0, not -1.0"),
        ({"hue": 0.6}, "--hue must lie between 0 and 0.5, not 0.6"),
        ({"precision": "fp8"}, "--precision must be one of fp32, bf16, fp16, not 'fp8'"),
    ],
)
def test_values_that_break_a_rule_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        PretrainConfig(**options)


def test_names_that_are_not_utf8_are_options_arguments_and_text(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": "im\udcfe", "epochs": 7}))
    options = pretrain.make_parser().parse_args(["--config", str(tmp_path / "config.yaml"), "--out", "out\udcfe"])
    assert (options.data, options.out, options.epochs) == ("im\udcfe", "out\udcfe", 7)
    assert detect.make_parser().parse_args(["run\udcfe", "--coco", "set"]).out == Path("run\udcfe")
    atomic.write_text(tmp_path / "table.md", "stra\udcdfe")
    assert (tmp_path / "table.md").read_text() == r"stra\udcdfe"


def test_help_is_as_wide_as_the_terminal(monkeypatch):
    made = pretrain.make_parser()
    monkeypatch.setenv("COLUMNS", "200")
    wide = made.format_help()
    monkeypatch.setenv("COLUMNS", "60")
    narrow, _, examples = made.format_help().partition("examples:")
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, wide.splitlines())) <= cli.WIDTH
    assert "".join(narrow.split()) == "".join(wide.partition("examples:")[0].split())
    assert examples.strip() == wide.partition("examples:")[2].strip(), "commands keep their lines"
