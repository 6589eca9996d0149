"""What the documentation and the recipes say, works."""

import re
from pathlib import Path

import pytest
import torch

from dspnet_fast.models import build, family
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
    known = {option for action in make_parser()._actions for option in action.option_strings}
    known |= {"--json", "--baselines", "--dn", "--references", "--k", "--backends", "--shards"}  # of the other commands
    known |= {"--onnx", "--switchable", "--threads", "--dry-run"}  # of train.export
    known |= {"--no-build-isolation", "--inplace", "--benchmark-only", "--quick"}  # of pip, pytest and others
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()):
        assert option in known, option
