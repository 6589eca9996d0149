"""What the documentation and the recipes say, works."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from dspnet_fast.models import build, family
from train import compare, detect, evaluate, finetune
from train.cli import to_config
from train.config import PretrainConfig
from train.pretrain import make_parser

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_describes_a_family_that_can_be_built(recipe):
    config = to_config(PretrainConfig, make_parser().parse_args(["--config", str(recipe)]))
    made = family(config.network, config.names())
    with torch.device("meta"):
        build(config.network, made.full, config.stem)
    assert recipe.stem.startswith("byol_" if len(made) == 1 else "dspnet_")
    assert recipe.stem.endswith(f"_{config.epochs}e")


COMPARISONS = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))
PLANS = [
    ("evaluate", "linear", "dspnet_mobilenet-v3_imagenet_300e", "evaluate/linear_imagenet_80e"),
    ("evaluate", "semi", "dspnet_resnet_imagenet_300e", "evaluate/semi_imagenet_50e"),
    ("finetune", "--from", "dspnet_mobilenet-v3_imagenet_300e", "finetune/slimmable_mobilenet-v3_imagenet_300e"),
    ("finetune", "--from", "none", "finetune/slimmable_mobilenet-v3_imagenet_300e"),
]
DETECT = "detect/mask-rcnn_coco_180k"


@pytest.mark.parametrize(("command", "protocol", "start", "recipe"), PLANS)
def test_recipe_of_an_evaluation_can_be_counted_without_run_and_images(
    command, protocol, start, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # where no folder is called imagenet
    start = start if start == "none" else str(ROOT / "recipes" / f"{start}.yaml")
    main = {"evaluate": evaluate.main, "finetune": finetune.main}[command]
    with pytest.raises(SystemExit) as end:
        main([protocol, start, "--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--dry-run"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "1,281,167 to train on, 50,000 to test, 1,000 classes of imagenet, as published" in shown
    assert "together" in shown and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "dn"),
    [("dspnet_mobilenet-v3_imagenet_300e", "w0.50"), ("dspnet_resnet_imagenet_300e", "c64-d2222")],
)
def test_recipe_of_detection_can_be_counted_without_run_and_images(start, dn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipes = ROOT / "recipes"
    with pytest.raises(SystemExit) as end:
        detect.main([f"{recipes}/{start}.yaml", "--dn", dn, "--config", f"{recipes}/{DETECT}.yaml", "--dry-run"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "117,266 to train on, 5,000 to test, 80 categories, as published" in shown
    assert "180,000 steps, 24.6 epochs" in shown and not list(tmp_path.iterdir())


def test_every_recipe_of_an_evaluation_is_counted():
    folders = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in (ROOT / "recipes").rglob("*/*.yaml")
    }
    assert folders == {recipe for *_, recipe in PLANS} | {f"compare/{recipe.stem}" for recipe in COMPARISONS} | {DETECT}


@pytest.mark.parametrize("recipe", COMPARISONS, ids=lambda path: path.stem)
def test_recipe_of_a_comparison_can_be_counted_without_images(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        compare.main(["--config", str(recipe), "--dry-run"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert " of 93,600 steps on 1,281,167 images of imagenet, as published" in shown
    assert "separate runs together" in shown and not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", COMPARISONS, ids=lambda path: path.stem)
def test_recipe_of_a_comparison_is_that_of_a_family(recipe):
    """But for what it says it changes."""
    name = "_".join(recipe.stem.split("_")[1:])
    mine = yaml.safe_load(recipe.read_text())
    theirs = yaml.safe_load((ROOT / "recipes" / f"dspnet_{name}.yaml").read_text())
    assert mine.pop("no_separate_runs", False) is (recipe.stem.split("_")[0] not in ("family-5", "family-6"))
    changed = {option for option in mine.keys() | theirs.keys() if mine.get(option) != theirs.get(option)}
    kind, _, count = recipe.stem.split("_")[0].partition("-")
    assert changed == ({"subnets_per_step"} if kind == "sampled" else {"dns"} if count in ("3", "11") else set())
    assert kind == "sampled" or len(mine["dns"].split(",")) == int(count)


def test_the_layers_page_runs(policy):  # which puts back what the page sets
    text = (ROOT / "docs" / "layers.md").read_text()
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(code, names)
    assert names["small"](names["images"]).shape == (8, 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        assert link.startswith("https:") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:train|dspnet_fast|csrc|kernels|recipes|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_exist(page):
    commands = (make_parser(), finetune.make_parser(), compare.make_parser(), detect.make_parser())
    parsers = (*commands, *evaluate.make_parsers().values())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--json", "--backends", "--shards", "--onnx", "--switchable", "--threads"}  # of the other commands
    known |= {
        "--no-build-isolation",
        "--inplace",
        "--benchmark-only",
        "--quick",
        "--standalone",
        "--nproc-per-node",
        "--nnodes",
        "--max-restarts",
        "--nodes",
        "--gpus-per-node",
    }  # of pip, pytest, torchrun, sbatch and others
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()):
        assert option in known, option
