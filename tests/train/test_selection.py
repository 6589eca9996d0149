"""Selection of kernels: faulty providers are refused, a run takes the verdict, a resumed run keeps its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dspnet_fast import info, verdicts
from dspnet_fast.ops import cpp, registry
from dspnet_fast.verdicts import Race, Verdict
from dspnet_fast.verification.supervisor import Outcome
from tests.commands import as_arguments, run
from train import finetune, pretrain, select
from train.cli import DONE, WRONG_INPUT
from train.config import FinetuneConfig
from train.distributed.process_group import World
from train.pretraining.run import PretrainRun
from train.selection import kernels, selection
from train.selection.kernels import Kernels, choose_kernels
from train.selection.recording import shape_of
from train.selection.selection import decide, key_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SABOTAGED = str(ROOT / "tests" / "verification" / "sabotaged.py")
# the reason for which the provider of each operator in sabotaged.py must be refused, a regular expression
REFUSALS = {
    "conv_norm": r"output 2 is not finite, in 1 of \d+ elements \(x ",  # it calls scale_shift
    "norm_act": r"output 0 is off by .*, the native body by .*; allowed are .* \(x \d+x\d+x\d+x\d+",
    "norm_act_backward": r"output 0 is off by .* \(grad \d+x\d*[13579]x",
    "scale_shift": r"output 1 is not finite, in 1 of \d+ elements \(mean ",
    "scale_shift_backward": r"output 0 differs between two calls with the same arguments \(",
    "slim_batch_norm": r"SIGSEGV ended the process \(x ",
    "slim_batch_norm_backward": r"no result within \d+ s \(",
    "normalized_mse": r"every call leaves [\d,]+ bytes of memory allocated \(p ",
    "normalized_mse_backward": r"it changes an argument that it must only read \(",
    "lars_ema_step": r"it writes outside an argument \(params ",
}
FAMILY = {"dns": "c8-d1111,c16-d1111", "warmup_epochs": 0, "probe_epochs": 0, "epochs": 1}
VERIFIED = {name: {"cpp": Outcome(True, "", 1, 0.5)} for name in registry.CONVOLUTIONS}


@pytest.fixture(autouse=True)
def restored(policy, tmp_path, monkeypatch):
    """Restore policy, findings and providers, and keep verdicts in a new folder."""
    providers = {name: dict(operator.providers) for name, operator in registry.operators.items()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_policy_of_environment", "")
    yield
    for name, before in providers.items():
        registry.operators[name].providers = before
    registry.use_findings({})


@pytest.fixture
def no_workers(monkeypatch):
    """Starting a process to verify or to race is an error."""

    def fail(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr("dspnet_fast.verification.supervisor.Worker", fail)
    monkeypatch.setattr("train.selection.selection.Worker", fail)


def verdict_of(config, formulation="fused", ranks=1, **changed):
    key = key_of(CPU, config.tf32, config.plugins) | changed
    shape = shape_of(config, ranks)
    return Verdict("2026-12-01", key, shape, VERIFIED, None, formulation, f"{formulation} was faster")


def test_verification_and_race_use_the_convolution_algorithms_of_the_run(monkeypatch):
    configured = []
    monkeypatch.setattr("train.selection.selection.configure_cuda", lambda *settings: configured.append(settings))
    monkeypatch.setattr("dspnet_fast.verdicts.key", lambda device, plugins: {})
    key_of(torch.device("cuda"), True, "", "benchmark")
    assert configured == [(True, "benchmark")]  # which become the settings of the processes


def losses(out):
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [loss for line in lines if "loss" in line for loss in line["loss"].values()]


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory):
    """The output of dspnet-select with faulty providers, and the cache with its verdict."""
    if not cpp.load()[0]:
        pytest.skip(cpp.load()[1])
    cache = tmp_path_factory.mktemp("cache")
    options = {"network": "resnet", "stem": "small", "image_size": 12, "hidden_features": 16, "out_features": 8}
    options |= {"batch_size": 8, "subnets_per_step": 3, "plugins": SABOTAGED, "call_seconds": 6, **FAMILY}
    # Other work on the machine must not discard the verdict.
    program = "import sys; from train.selection import selection; selection.NOISE = float('inf')\n"
    program += "selection.RACING_SECONDS['cpu'] = 1.0\nfrom train import select; select.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *as_arguments(options)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, cache


def test_module_of_the_library_is_the_command(run_python):
    assert "usage: dspnet-select" in run_python("-m", "dspnet_fast.select", "--help")


def test_command_uses_the_cache_unless_again(arguments, monkeypatch, capsys):
    made = []

    def selecting(config, device, ranks, call_seconds):
        made.append(verdict_of(config, ("fused", "eager")[len(made)], ranks))
        verdicts.write(made[-1])
        return made[-1]

    monkeypatch.setattr(select, "select", selecting)
    for flags, formulation in ((["--ranks=2"], "fused"), (["--ranks=2"], "fused"), (["--ranks=2", "--again"], "eager")):
        select._main([*arguments(**FAMILY), *flags])
        printed = capsys.readouterr().out
        assert f"{formulation}: {formulation} was faster" in printed and "kept in " in printed
    assert len(made) == 2 and made[0].run["images"] == 4
    found = info.collect()["verdicts"]
    assert [(verdict["formulation"], verdict["outdated"]) for verdict in found] == [("eager", "")]
    info.main([])
    assert "c8-d1111,c16-d1111, 12 px, 4 images, fp32" in capsys.readouterr().out


def test_faulty_providers_are_refused_by_name_with_a_reason(sabotaged):
    reasons = dict(re.findall(r"^(\w+) by cpp is refused: (.*)$", sabotaged[0], re.MULTILINE))
    assert reasons.keys() == REFUSALS.keys()
    for operator, reason in reasons.items():
        assert re.match(REFUSALS[operator], reason), operator


def test_command_prints_what_it_does_the_table_and_the_race(sabotaged):
    printed = sabotaged[0]
    assert re.search(r"^selecting kernels: recording the operators' calls with 4 images, 0 s$", printed, re.MULTILINE)
    rows = [line.split() for line in printed.splitlines()]
    results = {row[0]: row[-1] for row in rows if row[1:2] == ["cpp"]}
    sound = (*registry.CONVOLUTIONS, "slim_linear", "slim_linear_backward")
    assert results == dict.fromkeys(REFUSALS, "refused") | dict.fromkeys(sound, "verified")
    assert {"eager", "fused"} <= {row[0] for row in rows if row} and ["eager", "again"] in [row[:2] for row in rows]
    assert re.search(r"^kept in .*/dspnet-fast/verdicts/\w+\.json on ", printed, re.MULTILINE)


def test_run_with_refused_providers_is_right(sabotaged, small, tmp_path, monkeypatch, no_workers):
    """Without them the fused formulation runs native bodies. The second run takes the same verdict."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(sabotaged[1]))
    registry.set_policy("native")
    PretrainRun(small(**FAMILY, out=str(tmp_path / "native")), resume=False).run()
    (verdict,) = verdicts.read_all()
    verdicts.write(dataclasses.replace(verdict, formulation="fused"))
    config = small(**FAMILY, fast_kernels=True, plugins=SABOTAGED)
    for out in (tmp_path / "first", tmp_path / "second"):
        PretrainRun(dataclasses.replace(config, out=str(out)), resume=False).run()
        assert registry.get_policy() == "auto"
        serving = registry.serving("cpu")
        assert {name for name in REFUSALS if serving[name] == "native"} == REFUSALS.keys()
        assert serving["conv_moments"] == "cpp"
        found = json.loads((out / "kernels.json").read_text())
        assert found["formulation"] == "fused" and found["verdicts"][0]["operators"].keys() == verdict.operators.keys()
        assert losses(out) == pytest.approx(losses(tmp_path / "native"), rel=1e-3)


@pytest.mark.parametrize(
    ("fused", "control", "formulation"),
    [(0.5, 1.0, "fused"), (0.94, 1.0, "fused"), (0.96, 1.0, "eager"), (0.8, 1.1, "eager"), (0.7, 0.9, "fused")],
)
def test_fused_steps_must_be_faster_by_five_percent_and_three_spreads(fused, control, formulation):
    assert decide(Race(16, {"eager": 1.0, "fused": fused}, control, 5))[0] == formulation


def test_failed_race_gives_eager_and_is_not_kept(small, monkeypatch):
    class Ending:
        def __init__(self, *args):
            self.lines = iter([{"doing": "first steps of fused"}, None])

        def read(self, seconds):
            return next(self.lines)

        def failure(self):
            return "SIGFPE ended the process"

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(selection, "verify_run", lambda *args: VERIFIED)
    monkeypatch.setattr(selection, "Worker", Ending)
    verdict = selection.select(small(**FAMILY), CPU)
    assert verdict.formulation == "eager" and not list(verdicts.read_all())
    assert verdict.reason == "the race failed while first steps of fused: SIGFPE ended the process"


@pytest.mark.parametrize("known", [True, False])
def test_race_on_a_busy_machine_is_not_kept(small, monkeypatch, known):
    race = Race(16, {"eager": 2.0, "fused": 1.0}, 20.0, 3)
    monkeypatch.setattr(selection, "verify_run", lambda *args: VERIFIED)
    monkeypatch.setattr(selection, "_race", lambda *args: race)
    monkeypatch.setattr(registry, "known_to_be_fast", lambda device, precision: known)
    verdict = selection.select(small(**FAMILY), CPU)
    assert verdict.formulation == ("fused" if known else "eager") and not list(verdicts.read_all())
    assert verdict.reason == f"{selection.BUSY}: a step took 2 s and, again, 20 s"


def test_convolution_without_verified_provider_gives_eager_without_a_race(small, monkeypatch, no_workers):
    refused = VERIFIED | {"conv_moments_backward": {"cpp": Outcome(False, "off by 1")}}
    monkeypatch.setattr(selection, "verify_run", lambda *args: refused)
    verdict = selection.select(small(**FAMILY), CPU)
    assert (verdict.formulation, verdict.race) == ("eager", None)
    assert verdict.reason == "no provider of conv_moments_backward was verified"
    assert list(verdicts.read_all()) == [verdict]


def test_fp16_gives_eager_without_verification(small, no_workers):
    verdict = selection.select(small(**FAMILY, precision="fp16"), CPU)
    assert (verdict.formulation, verdict.operators) == ("eager", {})
    assert choose_kernels(small(**FAMILY, precision="fp16"), 10, CPU).formulation == "eager"


def without_batch_norm():
    layers = torch.nn.Conv2d(3, 16, 3), torch.nn.GroupNorm(4, 16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten())


def test_network_without_batch_normalisation_is_eager_without_verification(small, no_workers, capsys):
    config = small(network=f"{__name__}:without_batch_norm", dns="w0.50,w1.00", stem="standard", fast_kernels=True)
    verdict = selection.select(config, CPU)
    assert (verdict.formulation, verdict.operators, verdict.reason) == ("eager", {}, selection.NOTHING_TO_FUSE)
    expected = Kernels("eager", selection.NOTHING_TO_FUSE)
    assert choose_kernels(config, 10, CPU) == expected
    kernels.use_kernels(CPU, config, 16, None, tf32=False, plugins="", trains=True)
    assert capsys.readouterr().out == f"{expected.line()}\n"


@pytest.mark.parametrize("known", [True, False])
def test_short_run_without_verdict_does_not_select(small, monkeypatch, no_workers, known):
    monkeypatch.setattr(registry, "known_to_be_fast", lambda device, precision: known)
    config = small(**FAMILY, fast_kernels=True)
    run = PretrainRun(config, resume=False)
    expected = Kernels("fused" if known else "eager", kernels.SHORT)
    assert run.kernels == expected == Kernels.read(run.out)
    assert registry.get_policy() == ("auto" if known else "eager")
    assert expected.line() in run._description()


@pytest.mark.parametrize(("seconds", "selects"), [(1.0, False), (100.0, True)])
def test_long_run_selects(small, monkeypatch, seconds, selects):
    config = small(**FAMILY)
    monkeypatch.setattr(kernels, "step_seconds", lambda *args: seconds)
    monkeypatch.setattr(kernels, "select", lambda *args, write: verdict_of(config))
    assert bool(choose_kernels(config, 150, CPU).verdicts) == selects
    assert not choose_kernels(config, 99, CPU).verdicts, "no step is timed for a few steps"


def test_step_is_timed_without_changing_the_policy(small):
    registry.set_policy("native")
    assert 0 < kernels.step_seconds(small(batch_size=8), CPU, 1) < 60
    assert registry.get_policy() == "native"


def test_environment_overrides_selection(small, monkeypatch, no_workers, capsys):
    config = small(**FAMILY)
    verdicts.write(verdict_of(config))
    monkeypatch.setattr(registry, "_policy_of_environment", "native")
    assert choose_kernels(config, 10, CPU) == Kernels("native", "DSPNET_KERNELS is set")
    assert registry.get_policy() == "native"
    assert run(select) == WRONG_INPUT and "DSPNET_KERNELS=native overrides" in capsys.readouterr().err


def test_resumed_run_keeps_its_kernels(small, tmp_path, no_workers):
    config = small(**FAMILY, out=str(tmp_path))
    mine = Kernels("fused", "fused was faster", (verdict_of(config),))
    mine.write(tmp_path)
    verdicts.write(verdict_of(config, "eager"))
    assert choose_kernels(config, 10_000, CPU, resume=True) == mine
    assert registry.get_policy() == "auto"
    assert choose_kernels(config, 10_000, CPU).formulation == "eager"


@pytest.mark.parametrize(
    ("outcomes", "formulation", "reason"),
    [
        (VERIFIED, "fused", "fused was faster; verified again after a change: torch .* instead of 2.11"),
        ({}, "eager", "no provider of conv_moments, .* was verified after a change: torch .* instead of 2.11"),
    ],
)
def test_resumed_run_under_another_key_verifies_again(small, tmp_path, monkeypatch, outcomes, formulation, reason):
    config, printed = small(**FAMILY, out=str(tmp_path)), []
    monkeypatch.setattr(kernels, "verify_run", lambda *args: outcomes)
    Kernels("fused", "fused was faster", (verdict_of(config, torch="2.11"),)).write(tmp_path)
    chosen = choose_kernels(config, 10_000, CPU, resume=True, write=printed.append)
    assert chosen.formulation == formulation and re.fullmatch(reason, chosen.reason)
    assert printed == [f"kernels: selected elsewhere (torch {torch.__version__} instead of 2.11); verifying again"]
    chosen.write(tmp_path)
    assert choose_kernels(config, 10_000, CPU, resume=True, write=pytest.fail) == chosen, "not verified again"


def test_resumed_eager_run_stays_eager_and_says_so(small, tmp_path, no_workers):
    config, printed = small(**FAMILY, out=str(tmp_path)), []
    saved = Kernels("eager", "eager was faster", (verdict_of(config, "eager", threads=64),))
    saved.write(tmp_path)
    assert choose_kernels(config, 10_000, CPU, resume=True, write=printed.append) == saved
    assert printed == ["kernels: selected elsewhere (threads 1 instead of 64); the run stays eager"]


def test_resumed_run_that_was_short_needs_known_operators(small, tmp_path, monkeypatch, no_workers):
    config = small(**FAMILY, out=str(tmp_path))
    Kernels("fused", kernels.SHORT).write(tmp_path)
    for known in (True, False):
        monkeypatch.setattr(registry, "known_to_be_fast", lambda device, precision, known=known: known)
        chosen = choose_kernels(config, 10_000, CPU, resume=True)
        assert chosen.formulation == ("fused" if known else "eager")


@pytest.mark.parametrize("content", ["{", '{"formulation": "fused"}', "[]"])
def test_damaged_file_of_a_run_is_reported_and_replaced(small, tmp_path, caplog, content):
    config = small(**FAMILY, out=str(tmp_path))
    (tmp_path / "kernels.json").write_text(content)
    verdicts.write(verdict_of(config, "eager"))
    assert choose_kernels(config, 10, CPU, resume=True).formulation == "eager"
    assert "kernels.json is not used" in caplog.text


def test_other_commands_use_the_kernels_of_the_run(small, tmp_path, capsys, no_workers):
    config = small(**FAMILY)
    verdict = verdict_of(config)
    Kernels("fused", "", (verdict,)).write(tmp_path)

    def use(out, trains=False, image_size=config.image_size):
        kernels.use_kernels(CPU, config, image_size, out, tf32=False, plugins="", trains=trains)
        return registry.get_policy(), capsys.readouterr().out

    assert use(tmp_path) == ("auto", "kernels  fused: as in pretraining, fused was faster\n")
    assert "no verdict for these networks" in use(None)[1]
    verdicts.write(verdict_of(config, "eager"))
    assert use(None)[0] == "eager"
    assert "no verdict" in use(None, image_size=16)[1]
    bf16 = dataclasses.replace(verdict, run=verdict.run | {"precision": "bf16"})
    Kernels("fused", "", (bf16,)).write(tmp_path)
    assert use(tmp_path)[0] == "auto" and use(tmp_path, trains=True)[0] == "eager", "gradients are in fp32"
    options = {name: getattr(config, name) for name in ("network", "stem", "dns", "image_size")}
    finetune._use_kernels(FinetuneConfig(from_="none", data="none", **options))
    assert capsys.readouterr().out == "kernels  eager: as in pretraining, eager was faster\n"


class Ranks(World):
    """This rank's view of two ranks of which the other one gathers given values."""

    def gathering(self, *others):
        object.__setattr__(self, "_others", iter(others))
        return self

    def all_gather(self, value):
        return [value, next(self._others)]


def test_formulation_must_be_good_on_every_kind_of_device(small):
    config = small(**FAMILY)
    mine = verdict_of(config, ranks=2)
    verdicts.write(mine)
    alike = choose_kernels(config, 10, CPU, Ranks(0, 2).gathering(mine.key, None, None))
    assert alike == Kernels("fused", "fused was faster", (mine,))
    other = verdict_of(config, "eager", 2, device="b")
    mixed = choose_kernels(config, 10, CPU, Ranks(0, 2).gathering(other.key, None, other))
    assert mixed == Kernels("eager", "eager was faster (b)", (mine, other))


TWO_DEVICES = """
import os, sys
from dspnet_fast import info, verdicts

key = verdicts.key
verdicts.key = lambda *args: {**key(*args), "device": "device " + os.environ["RANK"]}

from train import pretrain
pretrain.main(sys.argv[1:])
"""


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
def test_ranks_with_different_verdicts_run_the_same_formulation(small, arguments, tmp_path):
    config = small(**FAMILY)
    found = [
        verdict_of(config, formulation, 2, device=f"device {rank}")
        for rank, formulation in enumerate(("fused", "eager"))
    ]
    for verdict in found:
        verdicts.write(verdict)
    (tmp_path / "two.py").write_text(TWO_DEVICES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "two.py"), *arguments(**FAMILY), "--fast-kernels"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels  eager: eager was faster (device 1)" in done.stdout
    assert Kernels.read(tmp_path / "run") == Kernels("eager", "eager was faster (device 1)", tuple(found))


def test_pretrain_writes_kernels_only_with_fast_kernels(arguments, tmp_path):
    for name, flags in (("without", []), ("with", ["--fast-kernels"])):
        assert run(pretrain, *arguments(**FAMILY, out=tmp_path / name), *flags) == DONE
    assert (tmp_path / "with" / "kernels.json").exists() and not (tmp_path / "without" / "kernels.json").exists()
