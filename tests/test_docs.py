"""The documentation's code, links and options, and the recipes, are valid."""

import ast
import builtins
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.commands import run
from train import compare, detect, evaluate, finetune, pretrain, select
from train.cli import to_config
from train.config import FinetuneConfig, PretrainConfig
from train.evaluate import PROTOCOLS
from train.pretrain import make_parser

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
PRETRAINING = sorted(RECIPES.glob("*.yaml"))
COMPARISONS = sorted((RECIPES / "compare").glob("*.yaml"))
EVALUATIONS = [path for kind in ("evaluate", "finetune", "detect") for path in sorted((RECIPES / kind).glob("*.yaml"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_recipe_name_gives_kind_and_epochs(recipe):
    config = to_config(PretrainConfig, make_parser().parse_args(["--config", str(recipe)]))
    kind = "teacher_" if config.teacher else "byol_" if len(config.names()) == 1 else "dspnet_"
    assert recipe.stem.startswith(kind)
    assert recipe.stem.endswith(f"_{config.epochs}e")


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_dry_run_of_a_recipe_needs_no_images(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # contains no folder named imagenet
    monkeypatch.delenv("DSPNET_DATA", raising=False)
    assert run(pretrain, "--config", str(recipe), "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("images        ", " epochs of ", "without activations"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_recipe_gives_steps_and_images_without_data(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSPNET_DATA", raising=False)
    comparison = compare.comparison_of(compare.make_parser().parse_args(["--config", str(recipe)]))
    expected = (390, 50_000) if "cifar" in recipe.stem else (93_600, 1_281_167)
    assert (comparison.steps, comparison.images) == expected
    assert comparison.initial_report()["ratios"]


@pytest.mark.parametrize("recipe", EVALUATIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_evaluation_recipe_has_valid_options(recipe):
    given = ["--config", str(recipe)]
    if recipe.parent.name == "evaluate":
        protocol = recipe.stem.split("_")[0]
        options = to_config(PROTOCOLS[protocol].options, evaluate.make_parsers()[protocol].parse_args(["OUT", *given]))
        options.check()
    elif recipe.parent.name == "finetune":
        to_config(FinetuneConfig, finetune.make_parser().parse_args(["--from", "OUT", *given]))
        finetune.completed(to_config(FinetuneConfig, finetune.make_parser().parse_args(["--from", "none", *given])))
    else:
        options = to_config(detect.DetectOptions, detect.make_parser().parse_args(["OUT", "--dn", "w0.50", *given]))
        assert options.hyperparameters().steps == 180_000


@pytest.mark.parametrize("recipe", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_recipe_equals_the_pretraining_recipe(recipe):
    """Except for the options that the comparison varies."""
    name = "_".join(recipe.stem.split("_")[1:])
    shorter = name.endswith("_1e")
    name = name.replace("_1e", "_10e")
    mine = yaml.safe_load(recipe.read_text())
    theirs = yaml.safe_load((ROOT / "recipes" / f"dspnet_{name}.yaml").read_text())
    kind, _, count = recipe.stem.split("_")[0].partition("-")
    assert mine.pop("no_separate_runs", False) is (kind == "sampled" or count in ("3", "11"))
    changed = {option for option in mine.keys() | theirs.keys() if mine.get(option) != theirs.get(option)}
    if shorter:
        changed -= {"epochs", "warmup_epochs", "seeds", "fast_kernels", "probe_epochs", "probe_images"}
    varied = {"sampled": {"subnets_per_step"}, "seeds": {"seeds", "separate"}}
    assert changed == varied.get(kind, {"dns"} if count in ("3", "11") else set())
    assert kind in varied or len(mine["dns"].split(",")) == int(count)


def test_code_of_the_layers_page_runs(policy):  # the fixture restores the policy that the page sets
    text = (ROOT / "docs" / "layers.md").read_text()
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(code, names)
    assert names["small"](names["images"]).shape == (8, 10)


def python_of(text: str) -> Iterator[ast.Module]:
    """The indented blocks of a page that are Python and not commands, output or formulas."""
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE):
        try:
            yield ast.parse("\n".join(line[4:] for line in block.splitlines()))
        except SyntaxError:
            assert not re.search(r"^    (import|from) ", block, re.MULTILINE), block


def unresolved(text: str) -> list[str]:
    """Attributes in a page's Python that do not exist, or whose modules the page does not import.

    A page without imports shows excerpts of modules and is not checked.
    """
    names: dict = {}
    imported, bound, wrong = set(), set(dir(builtins)), []
    for tree in python_of(text):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), names)
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not re.fullmatch(r"[\w.]+", ast.unparse(node)):
                continue
            root, *parts = ast.unparse(node).split(".")
            if root in bound:
                continue
            found = names.get(root)
            for part in parts:
                # a submodule must be imported by this page, even if another page or test has imported it
                found = getattr(found, part, None)
                if isinstance(found, types.ModuleType) and root == "dspnet_fast" and found.__name__ not in imported:
                    found = None
            if found is None:
                wrong.append(ast.unparse(node))
    return wrong if imported else []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_imports_the_modules_it_uses(page):
    assert unresolved(page.read_text()) == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("    import dspnet_fast.exported\n    dspnet_fast.exported.load(x).eval()\n", []),
        ("    import dspnet_fast.exported\n\nand\n\n    s = dspnet_fast.switchable.Switchable\n    s.load()\n", 2),
        ("    import dspnet_fast.exported\n    dspnet_fast.exported.lode(x)\n", ["dspnet_fast.exported.lode"]),
        ("    import torch\n    n = torchvision.models.resnet18()\n", 2),
        ("    from dspnet_fast import ops\n    ops.registry.set_policy('auto')\n", []),
        ("    pip install torchvision.models\n", []),
    ],
)
def test_unresolved_attributes_are_found(code, wrong):
    import dspnet_fast.switchable  # noqa: F401  (another test may have imported it)

    found = unresolved(code)
    assert len(found) == wrong if isinstance(wrong, int) else found == wrong


def test_failing_import_is_found():
    with pytest.raises(ImportError):
        unresolved("    from dspnet_fast.switchable import Switchables\n")


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
    modules = pretrain, select, finetune, compare, detect
    commands = [module.make_parser() for module in modules]
    parsers = (*commands, *evaluate.make_parsers().values())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {
        "--json",
        "--backends",
        "--shards",
        "--onnx",
        "--formats",
        "--card",
        "--license",
        "--push",
        "--switchable",
        "--threads",
        "--second",
        "--group",
        "--pixels",
        "--images",
        "--batches",
        "--spin-counts",
        "--compile",
    }  # options of other commands
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
    }  # options of pip, pytest, torchrun, sbatch and others
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()):
        assert option in known, option
