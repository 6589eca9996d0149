"""The launch scripts: their calls of srun and torchrun, and elastic.sh with a killed rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from fault_lab import ENVIRONMENT, ROOT, Lab, arguments, assert_same_run, losses, until
from fault_ranks import RANKS, processes_of, wait_for, whole_of_ranks

LAUNCH = ROOT / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

RANK = """
import os, signal, sys, time
from pathlib import Path

def save(number, frame):
    Path(os.environ["SEEN"], "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGUSR1, save)
Path(os.environ["SEEN"], "training").touch()
while True:
    time.sleep(0.02)
"""

FAKES = {
    "srun": """
        printf '%s\\n' "$@" > "$SEEN/srun"
        while [ "${1#-}" != "$1" ]; do shift; done
        exec "$@"  # the program gets the signals, as from srun
        """,
    # one rank, which exits with 0 after a request to save
    "torchrun": f"""
        printf '%s\\n' "$@" > "$SEEN/torchrun"
        [ ! -e "$SEEN/wait" ] && exit 0
        {sys.executable} -S -c "$RANK" &
        wait $!
        """,
    "scontrol": """
        echo "$@" >> "$SEEN/scontrol"
        [ "$1" = show ] && printf 'first\\nsecond\\n'
        """,
}


@pytest.fixture
def fakes(tmp_path):
    """An environment with fakes of the cluster's programs, and a folder in which each records its arguments."""
    programs, seen = tmp_path / "programs", tmp_path / "seen"
    programs.mkdir()
    seen.mkdir()
    for name, script in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}")
        (programs / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "1234",
        "SLURM_GPUS_ON_NODE": "8",
    }
    return {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen), "RANK": RANK}, seen


def arguments_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_and_prints_its_usage(script):
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode != 0 and "OUT [options of train.pretrain]" in done.stderr
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("holds_run", [False, True])
def test_slurm_starts_torchrun_on_every_machine(fakes, tmp_path, holds_run):
    environment, seen = fakes
    out = tmp_path / "a run"
    if holds_run:
        out.mkdir()
        (out / "config.yaml").touch()
    options = ["--data", "a folder/{000..015}.tar", "--epochs", "3"]
    subprocess.run([LAUNCH / "slurm.sh", out, *options], env=environment, check=True, timeout=30)
    assert arguments_of(seen / "srun")[:3] == ["--kill-on-bad-exit=1", "bash", "-c"]
    assert arguments_of(seen / "torchrun") == [
        *("--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29734", "--rdzv-id=1234"),
        *("-m", "train.pretrain", *options, "--out", str(out), *["--resume"] * holds_run),
    ]
    assert arguments_of(seen / "scontrol") == ["show hostnames n[1-2]"]


def test_slurm_requests_a_signal_before_the_time_limit():
    directives = [line for line in (LAUNCH / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@120" in directives and "#SBATCH --requeue" in directives


def test_slurm_signals_the_ranks_and_requeues_the_job(fakes, tmp_path):
    environment, seen = fakes
    (seen / "wait").touch()
    job = subprocess.Popen([LAUNCH / "slurm.sh", tmp_path / "run"], env=environment)
    until((seen / "training").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (seen / "saved").exists()
    assert arguments_of(seen / "scontrol")[1:] == ["requeue 1234"]


def test_slurm_returns_the_exit_code_of_a_failed_job_without_requeueing(fakes, tmp_path):
    environment, seen = fakes
    torchrun = Path(environment["PATH"].split(":")[0]) / "torchrun"
    torchrun.write_text("#!/bin/bash\nexit 7\n")
    assert subprocess.run([LAUNCH / "slurm.sh", tmp_path / "run"], env=environment, timeout=30).returncode == 7
    assert len(arguments_of(seen / "scontrol")) == 1


def test_elastic_starts_torchrun_with_restarts(fakes, tmp_path):
    environment, seen = fakes
    environment |= {"NODES": "2:4", "RANKS": "8", "ENDPOINT": "first:29500"}
    subprocess.run([LAUNCH / "elastic.sh", tmp_path / "mine", "--epochs", "3"], env=environment, check=True, timeout=30)
    passed = arguments_of(seen / "torchrun")
    assert passed[:7] == [
        *("--nnodes=2:4", "--nproc-per-node=8", "--max-restarts=3"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=first:29500", "--rdzv-id=mine", "--no-python"),
    ]
    assert passed[7:9] == ["bash", "-c"] and passed[-3:] == ["rank", "--epochs", "3"]


@pytest.mark.parametrize("holds_run", [False, True])
def test_elastic_ranks_resume_an_existing_run_at_every_start(fakes, tmp_path, holds_run):
    environment, seen = fakes
    out = tmp_path / "a run"
    out.mkdir()
    if holds_run:
        (out / "config.yaml").touch()
    programs = Path(environment["PATH"].split(":")[0])
    # as torchrun with --no-python
    (programs / "torchrun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (programs / "interpreter").write_text('#!/bin/bash\nprintf \'%s\\n\' "$@" > "$SEEN/rank"\n')
    (programs / "interpreter").chmod(0o755)
    environment["PYTHON"] = "interpreter"
    subprocess.run([LAUNCH / "elastic.sh", out, "--data", "two words"], env=environment, check=True, timeout=30)
    expected = ["-m", "train.pretrain", "--data", "two words", "--out", str(out), *["--resume"] * holds_run]
    assert arguments_of(seen / "rank") == expected


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("machines", [1, 2])
def test_elastic_run_with_a_killed_rank_ends_with_the_same_bits(lab: Lab, tmp_path, machines):
    """With two launchers only one loses a rank, and each counts its restarts separately."""
    lab.whole = whole_of_ranks(lab.images, tmp_path / "whole")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (programs / "torchrun").chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "NODES": f"{machines}:{machines}",
        "RANKS": str(RANKS // machines),
        "ENDPOINT": f"localhost:{free_port()}",
    }
    jobs = [
        subprocess.Popen(
            [str(LAUNCH / "elastic.sh"), str(lab.out), *arguments(data=lab.images)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(machines)
    ]
    until(lambda: jobs[0].poll() is not None or len(losses(lab.seen)) >= 4)
    os.kill(list(processes_of(jobs[-1].pid).values())[-1], signal.SIGKILL)
    printed, codes = zip(*(wait_for(job) for job in jobs), strict=True)
    assert set(codes) == {0}, "\n".join(printed)
    assert "resumed at step" in "\n".join(printed)
    assert_same_run(lab.seen, lab.whole)
