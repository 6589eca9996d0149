"""A folder of another kind than a command needs gives one line that says what it is and what to give."""

import re

import pytest

from dspnet_fast.exported import MANIFEST
from tests.commands import run
from train import cli, detect, embed, evaluate, export, finetune, pretrain, report
from train.cli import DONE, WRONG_INPUT
from train.run.checkpoint import path_of


@pytest.fixture
def folder(tmp_path):
    """folder(kind): a path that is no run directory."""

    def make(kind):
        path = tmp_path / "wrong"
        if kind == "file":
            path.write_text("text")
        elif kind != "missing":
            path.mkdir()
        if kind == "export":
            (path / MANIFEST).write_text("{}")
        if kind == "exports":
            (path / "w0.50").mkdir()
            (path / "w0.50" / MANIFEST).write_text("{}")
        if kind == "checkpoints":
            (path / "checkpoints").mkdir()
            path_of(path / "checkpoints", 1).touch()
        return path

    return make


COMMANDS = {
    "pretrain": (pretrain, ("--resume", "--out", "X")),
    "finetune": (finetune, ("--resume", "--out", "X")),
    "finetune-from": (finetune, ("--from", "X", "--out", "OUT")),
    "knn": (evaluate, ("knn", "X")),
    "dense": (evaluate, ("dense", "X")),
    "detect": (detect, ("X", "--dn", "w0.50", "--coco", "DATA")),
    "export": (export, ("X",)),
    "report": (report, ("X",)),
}
REASONS = {
    "missing": "it is missing",
    "file": "it is a file",
    "export": "it is an exported network; give the --out of dspnet-",
    "exports": "it has exported networks, such as w0.50; give ",
    "checkpoints": "it has checkpoints, but not their config.yaml; copy that file back",
    "empty": "there is no config.yaml in it; give the --out of dspnet-",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("name", COMMANDS)
def test_folder_without_a_run_is_described(folder, images, tmp_path, capsys, name, kind):
    module, arguments = COMMANDS[name]
    path = folder(kind)
    values = {"X": path, "OUT": tmp_path / "new", "DATA": images}
    assert run(module, *(values.get(argument, argument) for argument in arguments)) == WRONG_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    if kind == "file" and name in ("knn", "dense", "detect"):  # the folder of the results, which is checked first
        assert f"{path} is not a folder" in shown.err
    else:
        assert f"{path} holds no run: {REASONS[kind]}" in shown.err
    assert not (tmp_path / "new").exists()


def test_run_of_another_command_is_named(finished, capsys):
    assert run(finetune, "--resume", "--out", finished) == WRONG_INPUT
    assert "is a run of dspnet-pretrain; this command needs one of dspnet-finetune" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "reason"), [("export", "is an exported network"), ("checkpoints", "has checkpoints")])
def test_new_run_is_refused_in_a_folder_with_other_results(folder, arguments, finished, capsys, kind, reason):
    path = folder(kind)
    before = sorted(path.rglob("*"))
    assert run(pretrain, *arguments(out=path)) == WRONG_INPUT
    assert f"--out {path} {reason}" in capsys.readouterr().err
    assert run(finetune, "--from", finished, "--out", path, "--epochs", 1) == WRONG_INPUT
    assert f"--out {path} {reason}" in capsys.readouterr().err
    assert sorted(path.rglob("*")) == before


def test_unusable_initial_weights_leave_no_run(finished, arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(pretrain, *arguments(init_from=finished, dns="c8-d1111")) == WRONG_INPUT
    assert "give --init-from a run with the same --network" in capsys.readouterr().err
    assert run(pretrain, *arguments(init_from=tmp_path)) == WRONG_INPUT
    assert not out.exists()
    assert run(pretrain, *arguments(init_from=finished, epochs=1)) == DONE, "after the mistake is mended"


def test_missing_permission_is_one_line(capsys):
    def main(argv):
        raise PermissionError(13, "Permission denied", "runs/first/config.yaml")

    with pytest.raises(SystemExit) as ended:
        cli.run(main, [])
    assert ended.value.code == WRONG_INPUT
    assert capsys.readouterr().err.startswith("error: this user may not use runs/first/config.yaml: ")


def test_export_folder_is_embedded_and_its_parent_is_described(trained, images, tmp_path, capsys):
    assert run(export, trained, "--dn", "c8-d1111", "--threads", 1) == DONE
    capsys.readouterr()
    arguments = ("--data", images / "test" / "blobs", "--out", tmp_path / "features.npy")
    assert run(embed, trained / "exported", *arguments) == WRONG_INPUT
    assert re.search(r"it has exported networks, such as c\d+-d\d+; give one of them", capsys.readouterr().err)
    assert run(embed, trained / "exported" / "c8-d1111", *arguments) == DONE


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.yaml", None, "is missing: give a YAML file"),
        ("", None, "is a folder: give a YAML file"),
        ("text.yaml", "hello", "the file has no options"),
    ],
)
def test_wrong_configuration_file_is_described(tmp_path, capsys, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert run(pretrain, "--config", tmp_path / name, "--out", tmp_path / "run") == WRONG_INPUT
    error = capsys.readouterr().err
    assert "--config" in error and reason in error and error.count("\n") == 1
