"""benchmarks/gpu without a GPU: recorded results, the page, and the parts of run_all.sh after failures.

Clock and memory of torch.cuda are replaced, so their readings are not tested.
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
NO_XDIST = {"PYTEST_XDIST_WORKER": None}  # the inner pytest session is not a worker of the outer one
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
    """The file of results."""
    monkeypatch.setenv("DSPNET_BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DSPNET_BENCH_LOCK", str(tmp_path / "lock"))
    return tmp_path / "results.jsonl"


@pytest.fixture
def fake_cuda(monkeypatch, policy):
    """Replace CUDA measurements; variants are small native networks."""
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


def benchmark(other=""):
    return step.StepBenchmark(CASE, Console(quiet=True), other)


def test_read_skips_an_incomplete_line(results):
    records.write("part", name="build")
    records.write("part", name="tests")
    with results.open("a") as file:
        file.write('{"kind": "part", "na')
    assert [line["name"] for line in records.read()] == ["build", "tests"]


def test_all_variants_are_timed_and_recorded(fake_cuda, results):
    found = benchmark()
    assert found.run(seconds=0)
    assert set(found.lines) == {page.EAGER, "ours", page.AGAIN}
    for line in found.lines.values():
        assert len(line["ms"]) == step.ROUNDS[0] and line["interleaved"] and not line.get("error")
        assert (line["peak_MiB"], line["syncs"]) == (2, 0)
    shown = page.Results(records.read())
    (variants,), (limit,) = shown.steps.values(), shown.limits.values()
    assert {name: line["ms"] for name, line in variants.items()} == {n: line["ms"] for n, line in found.lines.items()}
    assert limit["subnets"] == ["c8-d1111", "c12-d1111", "c16-d1111"] and limit["TFLOP"] > 0
    assert not shown.faults() and "| ours | " in shown.page()


def test_separate_variant_is_compared_with_the_baseline(fake_cuda, results):
    separate = benchmark(page.TRIED)
    assert separate.run(seconds=0)
    assert set(separate.lines) == {page.TRIED} and len(separate.lines[page.TRIED]["ms"]) == step.ROUNDS[0]
    (variants,) = page.Results(records.read()).steps.values()
    assert set(variants) == {page.TRIED}


@pytest.mark.parametrize("when", ["built", "run"])
def test_failed_variant_is_named_and_the_others_are_timed(when, fake_cuda, results, monkeypatch):
    def build(variant, *rest):
        made = original(variant, *rest)
        if variant.policy is None:
            return made
        if when == "built":
            raise Exception("")  # like some of Triton's errors: without a specific type or a message

        def fails():
            calls.append(1)
            if len(calls) > 9:  # after its preparation
                raise Exception("out of resources\nmore")
            return made()

        return fails

    original, calls = step.build, []
    monkeypatch.setattr(step, "build", build)
    found = benchmark()
    assert found.run(seconds=0)
    assert len(found.lines[page.EAGER]["ms"]) == step.ROUNDS[0]
    variants = page.Results(records.read()).steps[("resnet", 4, 12, "fp32")]
    assert "Traceback" in variants["ours"]["trace"] and variants["ours"]["error"].startswith("Exception: ")
    assert ("ms" in variants["ours"]) == (when == "run")
    assert page.main([str(results), str(results.with_name("results.md"))]) == 1


def test_speed_up_is_not_shown_for_different_losses(fake_cuda, results, monkeypatch):
    def build(variant, *rest):
        made = original(variant, *rest)
        return made if variant.policy is None else lambda: {name: 1.01 * loss for name, loss in made().items()}

    original = step.build
    monkeypatch.setattr(step, "build", build)
    found = benchmark()
    assert found.run(seconds=0)
    row = next(line for line in page.step_table({"images": 4}, found.lines).splitlines() if "| ours" in line)
    name, *_, against_eager, against_compile = (cell.strip() for cell in row.split("|")[1:7])
    assert "by 1.0e-02" in name and (against_eager, against_compile) == ("", "")
    assert page.faults_of(found.lines)


def test_launches_records_kernels_without_launching(monkeypatch, policy):
    pytest.importorskip("triton")
    observers = []

    @contextlib.contextmanager
    def observed(observe):
        observers.append(observe)
        yield

    monkeypatch.setattr(warm, "observed", observed)
    monkeypatch.setattr(warm, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(step, "FAMILIES", TINY)
    monkeypatch.setattr(warm.registry, "set_policy", lambda policy: None)
    assert warm.launches([CASE]) == [] and len(observers) == 1


def test_outcomes_of_tests_are_recorded(results, run_python, tmp_path):
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0, 'why'\n@pytest.fixture\ndef f(): 1 / 0\n"
    (tmp_path / "test_these.py").write_text(tests + "def test_c(f): pass\n@pytest.mark.skip\ndef test_d(): pass\n")
    program = f"import pytest; pytest.main(['-p', 'benchmarks.gpu.verdicts', '{tmp_path}/test_these.py'])"
    run_python("-c", program, **NO_XDIST)
    outcomes = {line["id"][-1]: line["outcome"] for line in records.read()}
    assert outcomes == {"a": "passed", "b": "failed", "c": "failed", "d": "skipped"}
    assert "why" in next(line["text"] for line in records.read() if line["outcome"] == "failed")


def test_verdict_of_an_operator_combines_its_tests(results):
    for name, outcome in (("a.py::t[native]", "passed"), ("a.py::t[triton]", "failed"), ("a_pool.py::t", "passed")):
        records.write("test", id=f"tests/ops/test_{name}", outcome=outcome)
    records.write("test", id="tests/csrc/test_on_gpu.py::test_b[0]", outcome="passed")
    assert [verdicts.of(name) for name in ("a", "a_pool", "b", "c")] == ["failed", "passed", "passed", "untested"]


def test_started_variants_are_skipped(results, run_python):
    key = {"precision": "fp32", "operator": "normalized_mse", "case": "64 images, forward"}
    for variant in ("eager", "native", "cpp"):
        records.write("started", **key, variant=variant)
    options = "--benchmark-only", "-p", "no:cacheprovider", "-rs", "-k", "64 and not backward"
    printed = run_python("-m", "pytest", "benchmarks/ops/bench_normalized_mse.py", *options, **NO_XDIST)
    assert "3 skipped" in printed and "started before" in printed
    assert records.read()[-1]["kind"] == "operators done"


def operator_line(variant, ms, **others):
    known = {
        "precision": "bf16",
        "operator": "pool",
        "case": "small",
        "captured": True,
        "bytes": 1e9,
        "tests": "passed",
    }
    return {"kind": "operator", **known, "variant": variant, "ms": ms, "GB/s": 1, "GFLOP/s": 1, "share": 0.5, **others}


def test_page_lists_slower_providers_and_hides_speed_ups_of_failed_ones():
    lines = [operator_line("eager", 2.0), operator_line("triton", 3.0), operator_line("native", 4.0)]
    lines += [operator_line("triton", 1.0, case="large", tests="failed", captured=False, bytes=1)]
    shown = page.Results(lines)
    assert shown.slower() == [["pool", "small", "bf16", "triton", "0.67", "1.33"]]
    text = shown.page()
    assert "| pool | large | triton | 1.0000 | 1 | 0.0 | 50% | tests failed | launched, warm L2 |" in text
    assert not page.Results(lines[::2]).slower() and not shown.faults()
    started = {**lines[0], "kind": "started"}
    assert not page.Results([started, *lines]).faults() and len(page.Results([*lines, started]).faults()) == 1


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
def test_script_continues_after_failures_and_lists_them(breaks, tmp_path):
    (tmp_path / "python").write_text(STUB.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"
    given = {"PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "BREAKS": breaks}
    seconds = "9" if breaks == "DSPNET" else "470"  # too few to start any part
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
        assert not failed and done.returncode == 0 and "no failures" in done.stdout
    elif breaks == "resnet 512":
        assert failed == {"step bf16 resnet 512 128"}
    else:
        assert len([name for name in failed if name.startswith("operators bf16, attempt")]) == 3
    assert done.returncode == bool(failed)
    assert all(name in done.stdout.split("== failures")[-1] for name in failed)
    assert (out / "results.md").read_text().startswith("# On a GPU\n\nGPU none\n")
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])["kind"] == "environment"
    assert not list(out.glob("results.[0-9]*"))
