"""benchmarks/gpu without a GPU: what is kept when something fails, what the page says of it, what the script runs.

Clock and memory of torch.cuda are stood in for, so nothing here says that they are read well.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.gpu import page, records, step, verdicts, warm

ROOT = Path(__file__).parent.parent.parent
CASE = step.Case("resnet", 4, 12, "fp32")
SINGLE_PROCESS = {"PYTEST_XDIST_WORKER": None}  # a session of its own is no part of the one that starts it
TINY = {"resnet": "c8-d1111,c12-d1111,c16-d1111"}


class Event:
    def __init__(self, enable_timing):
        self.seconds = 0.0

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.seconds - self.seconds)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The file that lines are kept in."""
    monkeypatch.setenv("DSPNET_BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DSPNET_BENCH_LOCK", str(tmp_path / "lock"))
    return tmp_path / "results.jsonl"


@pytest.fixture
def pretended(monkeypatch, policy):
    """What a step is measured by on a GPU; ours are native, of few channels."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in {"memory_reserved": 2**20, "max_memory_reserved": 3 * 2**20, "memory_stats": {}}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(machine, "peak_gflops", lambda: 100.0)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda footprint: 10.0)
    monkeypatch.setattr(step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(step, "FAMILIES", TINY)
    monkeypatch.setattr(step, "SAMPLE", 0)
    configuration = step.configuration
    small = {"hidden_features": 16, "out_features": 8}
    monkeypatch.setattr(step, "configuration", lambda *args: replace(configuration(*args), **small))
    monkeypatch.setattr(step, "VARIANTS", {page.EAGER: step.Variant(), "ours": step.Variant("native", graphs=True)})


def race(other=""):
    return step.Race(CASE, Console(quiet=True), other)


def test_lines_are_kept_at_once_and_one_that_was_cut_off_is_left_out(results):
    records.write("part", name="build")
    records.write("part", name="tests")
    with results.open("a") as file:
        file.write('{"kind": "part", "na')
    assert [line["name"] for line in records.read()] == ["build", "tests"]


def test_variants_take_turns_and_everything_is_kept(pretended, results):
    found = race()
    assert found.run(seconds=0)
    assert set(found.lines) == {page.EAGER, "ours", page.AGAIN}
    for line in found.lines.values():
        assert len(line["ms"]) == step.ROUNDS[0] and line["turns"] and not line.get("error")
        assert (line["peak_MiB"], line["syncs"]) == (2, 0)
    shown = page.Results(records.read())
    (variants,), (limit,) = shown.steps.values(), shown.limits.values()
    assert {name: line["ms"] for name, line in variants.items()} == {n: line["ms"] for n, line in found.lines.items()}
    assert limit["subnets"] == ["c8-d1111", "c12-d1111", "c16-d1111"] and limit["TFLOP"] > 0
    assert not shown.faults() and "| ours | " in shown.page()


def test_what_is_timed_alone_is_beside_the_comparison(pretended, results):
    alone = race(page.TRIED)
    assert alone.run(seconds=0)
    assert set(alone.lines) == {page.TRIED} and len(alone.lines[page.TRIED]["ms"]) == step.ROUNDS[0]
    (variants,) = page.Results(records.read()).steps.values()
    assert set(variants) == {page.TRIED}


@pytest.mark.parametrize("when", ["built", "run"])
def test_a_variant_that_fails_is_named_and_the_others_are_timed(when, pretended, results, monkeypatch):
    def build(variant, *rest):
        made = original(variant, *rest)
        if variant.policy is None:
            return made
        if when == "built":
            raise Exception("")  # as Triton's, of no kind that one could wait for, and without a word

        def fails():
            calls.append(1)
            if len(calls) > 9:  # when it has been entered
                raise Exception("out of resources\nmore")
            return made()

        return fails

    original, calls = step.build, []
    monkeypatch.setattr(step, "build", build)
    found = race()
    assert found.run(seconds=0)
    assert len(found.lines[page.EAGER]["ms"]) == step.ROUNDS[0]
    variants = page.Results(records.read()).steps[("resnet", 4, 12, "fp32")]
    assert "Traceback" in variants["ours"]["trace"] and variants["ours"]["error"].startswith("Exception: ")
    assert ("ms" in variants["ours"]) == (when == "run")
    assert page.main([str(results), str(results.with_name("results.md"))]) == 1


def test_nothing_is_said_of_what_another_step_gains(pretended, results, monkeypatch):
    def build(variant, *rest):
        made = original(variant, *rest)
        return made if variant.policy is None else lambda: {name: 1.01 * loss for name, loss in made().items()}

    original = step.build
    monkeypatch.setattr(step, "build", build)
    found = race()
    assert found.run(seconds=0)
    row = next(line for line in page.step_table({"images": 4}, found.lines).splitlines() if "| ours" in line)
    name, *_, against_eager, against_compile = (cell.strip() for cell in row.split("|")[1:7])
    assert "1.0e-02 apart" in name and (against_eager, against_compile) == ("", "")
    assert page.faults_of(found.lines)


def test_the_kernels_of_a_step_are_seen_without_launching_them(monkeypatch, policy):
    pytest.importorskip("triton")
    noted = []

    @contextlib.contextmanager
    def observed(observe):
        noted.append(observe)
        yield

    monkeypatch.setattr(warm, "observed", observed)
    monkeypatch.setattr(warm, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(step, "FAMILIES", TINY)
    monkeypatch.setattr(warm.registry, "set_policy", lambda policy: None)
    assert warm.launches([CASE]) == [] and len(noted) == 1


def test_outcomes_of_tests_are_kept(results, run_python, tmp_path):
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0, 'why'\n@pytest.fixture\ndef f(): 1 / 0\n"
    (tmp_path / "test_these.py").write_text(tests + "def test_c(f): pass\n@pytest.mark.skip\ndef test_d(): pass\n")
    program = f"import pytest; pytest.main(['-p', 'benchmarks.gpu.verdicts', '{tmp_path}/test_these.py'])"
    run_python("-c", program, **SINGLE_PROCESS)
    kept = {line["id"][-1]: line["outcome"] for line in records.read()}
    assert kept == {"a": "passed", "b": "failed", "c": "failed", "d": "skipped"}
    assert "why" in next(line["text"] for line in records.read() if line["outcome"] == "failed")


def test_verdicts_on_operators(results):
    for name, outcome in (("a.py::t[native]", "passed"), ("a.py::t[triton]", "failed"), ("a_pool.py::t", "passed")):
        records.write("test", id=f"tests/ops/test_{name}", outcome=outcome)
    records.write("test", id="tests/csrc/test_on_gpu.py::test_b[0]", outcome="passed")
    assert [verdicts.of(name) for name in ("a", "a_pool", "b", "c")] == ["failed", "passed", "passed", "untested"]


def test_what_has_been_begun_is_not_begun_again(results, run_python):
    key = {"precision": "fp32", "operator": "normalized_mse", "case": "64 images, forward"}
    for variant in ("eager", "native", "cpp"):
        records.write("begun", **key, variant=variant)
    options = "--benchmark-only", "-p", "no:cacheprovider", "-rs", "-k", "64 and not backward"
    printed = run_python("-m", "pytest", "benchmarks/ops/bench_normalized_mse.py", *options, **SINGLE_PROCESS)
    assert "3 skipped" in printed and "begun before" in printed
    assert records.read()[-1]["kind"] == "operators done"


def operator_line(variant, ms, **others):
    known = {
        "precision": "bf16",
        "operator": "pool",
        "case": "small",
        "recorded": True,
        "bytes": 1e9,
        "tests": "passed",
    }
    return {"kind": "operator", **known, "variant": variant, "ms": ms, "GB/s": 1, "GFLOP/s": 1, "share": 0.5, **others}


def test_the_page_says_where_a_kernel_loses_and_gains_nothing_if_it_is_wrong():
    lines = [operator_line("eager", 2.0), operator_line("triton", 3.0), operator_line("native", 4.0)]
    lines += [operator_line("triton", 1.0, case="large", tests="failed", recorded=False, bytes=1)]
    shown = page.Results(lines)
    assert shown.slower() == [["pool", "small", "bf16", "triton", "0.67", "1.33"]]
    text = shown.page()
    assert "| pool | large | triton | 1.0000 | 1 | 0.0 | 50% | tests failed | launched, warm L2 |" in text
    assert not page.Results(lines[::2]).slower() and not shown.faults()
    begun = {**lines[0], "kind": "begun"}
    assert not page.Results([begun, *lines]).faults() and len(page.Results([*lines, begun]).faults()) == 1


STUB = """\
#!/bin/bash
echo "$DSPNET_BENCH_DTYPE $*" >> "$CALLS"
case "$*" in
  *gpu.probe) echo '{{"kind": "environment", "GPU": "none"}}' > "$DSPNET_BENCH_RESULTS"; echo "none 90";;
  *gpu.page*) exec {python} "$@";;
  *"pytest benchmarks/ops"*) [ "$BREAKS" != operators ] || exit 3;;
  *"$BREAKS"*) exit 3;;
esac
exit 0
"""


@pytest.mark.parametrize("breaks", ["nothing at all", "resnet 512", "operators", "DSPNET"])
def test_the_script_goes_on_and_names_what_failed(breaks, tmp_path):
    (tmp_path / "python").write_text(STUB.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"
    given = {"PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "BREAKS": breaks}
    seconds = "9" if breaks == "DSPNET" else "470"  # so few that nothing is begun
    command = ["bash", ROOT / "benchmarks/gpu/run_all.sh", out]
    done = subprocess.run(
        command, env={**os.environ, **given, "DSPNET_BENCH_SECONDS": seconds}, capture_output=True, text=True
    )
    begun = calls.read_text().splitlines()
    parts = {line["name"]: line["code"] for line in records.read(out / "results.jsonl") if line["kind"] == "part"}
    measured = [" ".join(line.split()[:1] + line.split()[3:]) for line in begun if "gpu.step" in line]
    if breaks == "DSPNET":
        assert set(parts.values()) == {-1} and done.returncode == 1 and not measured
        return
    assert measured[0] == "bf16 mobilenet_v3_large 1024 128 --compiled --seconds 4"
    assert measured[1] == "bf16 mobilenet_v3_large 1024 128" and len(measured) > 8
    failed = {name for name, code in parts.items() if code}
    if breaks == "nothing at all":
        assert not failed and done.returncode == 0 and "nothing failed" in done.stdout
    elif breaks == "resnet 512":
        assert failed == {"step bf16 resnet 512 128"}
    else:
        assert len([name for name in failed if name.startswith("operators bf16, attempt")]) == 3
    assert done.returncode == bool(failed)
    assert all(name in done.stdout.split("== what failed")[-1] for name in failed)
    assert (out / "results.md").read_text().startswith("# On a GPU\n\nGPU none\n")
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])["kind"] == "environment"
    assert not list(out.glob("results.[0-9]*"))
