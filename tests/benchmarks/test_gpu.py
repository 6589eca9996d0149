"""benchmarks/gpu without a GPU: a CPU stands in, with small networks. Tools of CUDA and graphs are not tested."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.gpu import calls, measuring, page, profile, records, step, verdicts

ROOT = Path(__file__).parent.parent.parent
CASE = step.Case("resnet", 4, 12, "fp32")
NO_XDIST = {"PYTEST_XDIST_WORKER": None, verdicts.SESSION: None}  # the inner session is not part of the outer one


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The file of results."""
    monkeypatch.setenv("DSPNET_BENCH_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DSPNET_BENCH_LOCK", str(tmp_path / "lock"))
    return tmp_path / "results.jsonl"


@pytest.fixture
def stand_in(monkeypatch, policy):
    """Measure no limits, take few samples of two variants, and another group of two."""
    monkeypatch.setattr(machine, "peak_gflops", lambda: 100.0)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda footprint: 10.0)
    monkeypatch.setattr(step, "SAMPLE", 0)
    monkeypatch.setattr(step, "VARIANTS", {**step.VARIANTS, "ours": step.Variant("native")})
    groups = {"all": [page.EAGER, "ours"], "compiled": [page.EAGER, page.COMPILED]}
    monkeypatch.setattr(step, "GROUPS", groups)


def benchmark(group="all"):
    return step.StepBenchmark(CASE, Console(quiet=True), group)


def test_read_skips_an_incomplete_line(results):
    records.write("part", name="build")
    records.write("part", name="tests")
    with results.open("a") as file:
        file.write('{"kind": "part", "na')
    assert [line["name"] for line in records.read()] == ["build", "tests"]


def test_all_variants_are_timed_and_recorded(stand_in, results):
    found = benchmark()
    assert found.run(seconds=0)
    assert set(found.lines) == {page.EAGER, "ours", page.EAGER + page.AGAIN}
    for line in found.lines.values():
        assert len(line["ms"]) == step.ROUNDS[0] and line["interleaved"] and not line.get("error")
        assert (line["peak_MiB"], line["syncs"]) == (0, 0)
    shown = page.Results(records.read())
    (variants,), (limit,) = shown.steps.values(), shown.limits.values()
    assert {name: line["ms"] for name, line in variants.items()} == {n: line["ms"] for n, line in found.lines.items()}
    assert limit["subnets"] == ["c8-d1111", "c12-d1111", "c16-d1111"] and limit["TFLOP"] > 0
    assert not shown.faults() and "| ours | " in shown.page()


def test_compiled_variant_is_prepared_without_the_lock_and_timed_with_it(stand_in, results, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    locked, held = [], []

    class Lock:
        def __enter__(self):
            held.append(True)

        def __exit__(self, *error):
            held.pop()

    seconds_of = step.seconds_of
    monkeypatch.setattr(records, "exclusive_gpu", Lock)
    monkeypatch.setattr(step, "seconds_of", lambda run: locked.append(bool(held)) or seconds_of(run))
    found = benchmark("compiled")
    assert found.run(seconds=0)
    assert set(found.lines) == {page.COMPILED} and len(found.lines[page.COMPILED]["ms"]) == step.ROUNDS[0]
    assert locked and all(locked)


def test_captured_baseline_gives_the_losses_of_the_first_step(stand_in, monkeypatch):
    def run_and_return(functions):
        for function in functions:
            function()
        return functions

    monkeypatch.setattr(measuring, "capture", run_and_return)
    batch = step.two_views(step.configuration(CASE))
    launched, graphs = (step.build(step.Variant(graphs=graphs), CASE, batch) for graphs in (False, True))
    for _ in range(3):
        torch.testing.assert_close(graphs(), launched())


@pytest.mark.parametrize("when", ["built", "run"])
def test_failed_variant_is_named_and_the_others_are_timed(when, stand_in, results, monkeypatch):
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


def test_speed_up_is_not_shown_for_different_losses(stand_in, results, monkeypatch):
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


def test_kernels_are_counted_by_operator_and_shapes():
    def event(name, kernels=(), children=()):
        found = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
        return SimpleNamespace(name=name, kernels=found, cpu_children=children, cpu_time_total=9)

    launch = event("cuLaunchKernel", [("gemm", 30.0), ("sums", 10.0)])
    events = [event("operator #0", children=[event("aten::mm", children=[launch])]), launch, event("operator #1")]
    events.append(event("operator #2", [("gemm", 20.0)]))
    calls = [("aten.mm", "2x3 3x4", 1000), ("aten.view", "2x3", 8), ("aten.mm", "2x3 3x4", 1000)]
    first, second = profile.rows(events, calls)
    assert first == {
        **{"operator": "aten.mm", "shapes": "2x3 3x4", "kernel": "gemm", "count": 2},
        **{"ms": pytest.approx(0.05), "GB/s": pytest.approx(2000 / 50e-6 / 1e9)},
    }
    assert (second["kernel"], second["count"]) == ("sums", 1)


def test_profile_of_a_step_has_its_operators(stand_in, results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profile", "resnet", "4", "12", "--policies", "native,eager"])
    profile.main()
    rows = [line for line in records.read() if line["kind"] == "kernel"]
    names = {(line["policy"], line["operator"]) for line in rows}
    assert {("native", "dspnet.conv_norm"), ("eager", "aten.convolution_backward")} <= names
    assert all(line["ms"] >= 0 and line["count"] >= 1 for line in rows)
    assert page.Results(records.read()).page().count("## Kernels of a step") == 2
    assert "| dspnet.conv_norm | " in capsys.readouterr().out


def test_classes_of_calls_cover_all_operators_and_kernels(monkeypatch):
    monkeypatch.setitem(step.FAMILIES, "mobilenet_v3_large", "w0.50,w1.00")
    found = calls.step_calls(step.Case("mobilenet_v3_large", 64, 64, "bf16"), small=False)
    chosen = calls.classes(found)
    assert {call.operator for call in chosen} == {call.operator for call in found}
    assert 40 <= len(chosen) <= 110
    names = {f"depthwise k{kernel} {way}" for kernel in (3, 5) for way in ("forward", "backward")}
    names |= {f"{name} {way}" for name in ("expand", "project") for way in ("forward", "backward")}
    assert calls.examined(found).keys() == names


def test_outcomes_of_tests_are_recorded(results, run_python, tmp_path):
    tests = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0, 'why'\n@pytest.fixture\ndef f(): 1 / 0\n"
    (tmp_path / "test_these.py").write_text(tests + "def test_c(f): pass\n@pytest.mark.skip\ndef test_d(): pass\n")
    program = f"import pytest; pytest.main(['-p', 'benchmarks.gpu.verdicts', '{tmp_path}/test_these.py'])"
    run_python("-c", program, **NO_XDIST)
    lines = records.read()
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["tests begun", "tests done"]
    outcomes = {line["id"][-1]: line["outcome"] for line in lines[1:-1]}
    assert outcomes == {"a": "passed", "b": "failed", "c": "failed", "d": "skipped"}
    assert "why" in next(line["text"] for line in lines if line.get("outcome") == "failed")


def test_verdict_of_an_operator_combines_tests_and_verification(results):
    for name, outcome in (("a.py::t[native]", "passed"), ("a.py::t[triton]", "failed"), ("a_pool.py::t", "passed")):
        records.write("test", id=f"tests/ops/test_{name}", outcome=outcome)
    records.write("test", id="tests/csrc/test_on_gpu.py::test_b[0]", outcome="passed")
    records.write("verified", operator="d", provider="triton", verified=True)
    records.write("verified", operator="b", provider="cuda", verified=False)
    found = [verdicts.of(name) for name in ("a", "a_pool", "b", "c", "d")]
    assert found == ["failed", "passed", "failed", "untested", "passed"]


def test_verdict_of_tests_that_were_cut_off_is_incomplete(results):
    functions = ["tests/ops/test_a.py::t", "tests/csrc/test_on_gpu.py::test_b"]
    for session, names in (("1", functions[:1]), ("2", functions)):
        records.write("tests begun", session=session, functions=names)
    records.write("test", id="tests/ops/test_a.py::t[triton]", outcome="passed")
    records.write("tests done", session="1")
    assert [verdicts.of("a"), verdicts.of("b")] == ["incomplete", "incomplete"]
    records.write("tests done", session="2")
    assert [verdicts.of("a"), verdicts.of("b")] == ["passed", "untested"]


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
  *"$HANGS"*) exec sleep 60;;
esac
exit 0
"""


@pytest.fixture
def run_all(tmp_path):
    """run_all(*arguments, breaks, hangs, seconds): run the script with a stub of Python.

    Returns its exit code, output, parts, and the command lines of timed steps.
    """
    (tmp_path / "python").write_text(STUB.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"

    def run(*arguments, breaks="nothing at all", hangs="nothing at all", seconds=570):
        calls.write_text("")
        given = {"PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "BREAKS": breaks, "HANGS": hangs}
        done = subprocess.run(
            ["bash", ROOT / "benchmarks/gpu/run_all.sh", *arguments, out],
            env={**os.environ, **given, "DSPNET_BENCH_SECONDS": str(seconds), "DSPNET_BENCH_DEVICE": "cuda"},
            capture_output=True,
            text=True,
        )
        lines = records.read(out / "results.jsonl")
        parts = {line["name"]: line for line in lines if line["kind"] == "part"}
        begun = calls.read_text().splitlines()
        steps = [" ".join(line.split()[:1] + line.split()[3:]) for line in begun if "gpu.step" in line]
        assert (out / "results.md").read_text().startswith("# On a GPU\n\nGPU none\n")
        return done.returncode, done.stdout, parts, steps

    return run


@pytest.mark.parametrize("breaks", ["nothing at all", "resnet 512", "operators"])
def test_script_continues_after_failures_and_lists_them(breaks, run_all):
    code, printed, parts, steps = run_all(breaks=breaks)
    order = [name for name in parts if name not in ("build", "warm")]  # these end in the background
    assert order[:5] == ["install", "limits", f"step {steps[0]}", "verify", f"step {steps[1]}"]
    assert steps[0] == "bf16 mobilenet_v3_large 1024 128 --group baseline --seconds 3"
    assert steps[1] == "bf16 mobilenet_v3_large 1024 128" and len(steps) == 4
    failed = {name for name, part in parts.items() if part["code"]}
    if breaks == "nothing at all":
        assert not failed and "no failures" in printed
    elif breaks == "resnet 512":
        assert failed == {"step bf16 resnet 512 128 --group short --seconds 4"}
    else:
        assert failed == {f"operators CUDA, attempt {attempt}" for attempt in (1, 2, 3)}
    assert code == bool(failed)
    assert all(name in printed.split("== failures")[-1] for name in failed)


def test_second_call_adds_to_the_results(run_all):
    first = run_all()[2]
    code, _, parts, steps = run_all("--second")
    assert code == 0 and first.keys() < parts.keys() and "tests of Triton" in parts
    assert steps[0] == "bf16 mobilenet_v3_large 1024 128 --group compiled --seconds 4" and len(steps) == 7


def test_script_ends_in_time_when_parts_hang(run_all):
    began = time.monotonic()
    code, printed, parts, _ = run_all(hangs="gpu.step", seconds=12)
    assert time.monotonic() - began < 30 and code == 1
    assert parts["verify"]["code"] == 0
    hung = [part["code"] for name, part in parts.items() if name.startswith("step")]
    assert set(hung) <= {124, -1} and 124 in hung
    assert "timed out" in printed


@pytest.mark.slow
def test_script_runs_on_a_stand_in_within_its_time(tmp_path):
    """The whole first call with small networks on the CPU. On a busy machine parts may time out, but not fail."""
    began = time.monotonic()
    out, given = tmp_path / "out", {"PYTHON": sys.executable, "DSPNET_BENCH_SECONDS": "300"}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run_all.sh", out],
        env={**os.environ, **given, "DSPNET_BENCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - began < 330
    lines = records.read(out / "results.jsonl")
    parts = [line for line in lines if line["kind"] == "part"]
    assert next(part["at"] for part in parts if part["name"].startswith("step")) <= 90
    assert {"verify", "profile", "training"} <= {part["name"] for part in parts}
    assert all(part["code"] in (0, *page.TIMED_OUT) for part in parts), done.stdout
    timed = page.Results(lines).steps[("mobilenet_v3_large", 1024, 128, "bf16")]
    assert {page.EAGER, page.EAGER_GRAPHS, "ours eager", "ours"} <= {n for n, line in timed.items() if "ms" in line}
    assert any(line["kind"] == "kernel" for line in lines)
