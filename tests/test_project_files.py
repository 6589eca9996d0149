"""Files that tools and services read: they parse, and what they refer to exists."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
YAML_FILES = [
    *(path for name in ("*.cff", "*.y*ml", ".*.yaml") for path in ROOT.glob(name)),
    *(path for folder in ("recipes", ".github") for path in (ROOT / folder).rglob("*.y*ml")),
]


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_yaml_file_parses(path):
    assert list(yaml.parse(path.read_text(), Loader=yaml.SafeLoader))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_make_targets_that_exist(workflow):
    called = {target for step in steps(workflow) for target in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert called and called <= TARGETS


def test_workflows_run_demo_tests_docs_and_wheels():
    text = "".join(workflow.read_text() for workflow in WORKFLOWS)
    assert all(f"make {target}" in text for target in ("demo", "test", "docs", "wheel"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_pins_actions_by_major_version(workflow):
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_page_names_make_targets_that_exist(page):
    assert set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", (ROOT / page).read_text(), re.MULTILINE)) <= TARGETS


@pytest.mark.parametrize("template", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_template_asks_for_the_machine(template):
    form = yaml.safe_load(template.read_text())
    assert form["name"] and form["description"]
    assert any("python -m dspnet_fast.info" in field["attributes"]["label"] for field in form["body"])


def test_pre_commit_hooks_use_the_virtual_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {"ruff-check", "ruff-format", "mypy", "check-yaml"} <= {hook["id"] for hook in hooks}
    assert all(hook["entry"].startswith(".venv/bin/python -m ") for hook in hooks)


def test_citation_is_of_the_newest_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## ([\d.]+) - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == newest.groups()


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in shown for target in ("install", "test", "docs", "demo", "wheel"))


def test_contributing_quotes_the_code_as_it_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    quotes = re.findall(r"From\s`([\w./]+)`:\n\n((?:    .*\n|\n)+)", text)
    assert len(quotes) >= 7
    for path, block in quotes:
        lines = {line.strip() for line in (ROOT / path).read_text().splitlines()}
        assert not {line.strip() for line in block.splitlines()} - lines - {"", "..."}, path


@pytest.fixture
def demo(tmp_path):
    """demo(importable): calls of Python by `make demo` in an empty checkout, with or without the teacher's package."""
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        (tmp_path / name).touch()
    for folder in ("csrc", "fashion-mnist", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    calls, python = tmp_path / "calls", tmp_path / ".venv/bin/python"

    def run(importable: bool) -> list[str]:
        fail = "" if importable else "case $* in *efficientnet*) exit 1;; esac"
        python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{fail}\n')
        python.chmod(0o755)
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", "--silent", "--file", ROOT / "Makefile", "demo", "DSPNET_CAPABILITY="],
            cwd=tmp_path,
            env={**os.environ, "DSPNET_DATA": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ("trains without a teacher" in done.stdout) is not importable
        return calls.read_text().splitlines()

    run.folder = tmp_path
    return run


def test_demo_learns_from_a_teacher_if_its_weights_can_be_installed(demo):
    for importable, recipe in ((True, "teacher_"), (False, "dspnet_")):
        (call,) = [call for call in demo(importable) if "train.pretrain" in call]
        (path,) = re.findall(r"--config (\S+)", call)
        assert path.startswith(f"recipes/{recipe}") and (ROOT / path).is_file()
        assert ("--teacher-cache" in call) is importable and "--resume" not in call


def test_demo_resumes_its_run(demo):
    (demo.folder / "runs/demo").mkdir(parents=True)
    (demo.folder / "runs/demo/config.yaml").touch()
    (call,) = [call for call in demo(True) if "train.pretrain" in call]
    assert call.endswith("--resume") and "--config" not in call
