"""Help and hints call commands what they are called where they are: in a checkout and in an installation."""

import ast
from pathlib import Path

import pytest

from train import called, cli, finetune, pretrain
from train.called import COMMANDS, as_called

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(called, "__package__", "dspnet_fast.train")


def test_every_command_is_installed_under_that_name(installed):
    strings = {node.value for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.Constant)}
    entries = {entry for entry in strings if isinstance(entry, str) and entry.endswith(":main")}
    expected = {f"{as_called(f'python -m train.{name}')} = dspnet_fast.train.{name}:main" for name in COMMANDS}
    assert entries == {*expected, "dspnet-info = dspnet_fast.info:main"}


def test_a_checkout_has_modules():
    text = "python -m train.data.shard writes what train.pretrain reads"
    assert as_called(text) == text


def test_an_installation_has_commands(installed):
    assert as_called("`python -m train.data.shard`, train.pretrain") == "`dspnet-shard`, dspnet-pretrain"
    other = "OUT/train.log, train.exporters, dspnet_fast.train.export, my/train.report, train.data.folder"
    assert as_called(other) == other


def test_an_installation_has_the_recipes_somewhere_else(installed):
    *_, recipe = as_called("dspnet-pretrain --config recipes/dspnet_resnet_cifar-10_10e.yaml").split()
    assert Path(recipe).is_absolute() and Path(recipe).is_file()
    assert as_called("my/recipes/x.yaml") == "my/recipes/x.yaml"


@pytest.mark.parametrize("command", [pretrain, finetune], ids=["pretrain", "finetune"])
def test_help(command, installed):
    text = command.make_parser().format_help()
    name = command.__name__.split(".")[-1]
    assert f"usage: dspnet-{name}" in text and f"\n  dspnet-{name} --" in text
    assert "train." not in text.replace("train.log", "") and "python -m" not in text


def test_messages(installed, capsys):
    with pytest.raises(SystemExit) as end:
        finetune.main(["--out", "x"])
    assert end.value.code == cli.WRONG_INPUT
    assert "name a run directory of dspnet-pretrain" in capsys.readouterr().err
