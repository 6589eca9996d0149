"""Two hosts, as network namespaces joined by a cable: the weights of one rank, and the traffic of the cost model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fault_lab import ENVIRONMENT, ROOT, Lab, arguments

from train.config import PretrainConfig
from train.costs.communication import traffic
from train.pretraining.dspnet import build_model
from train.run import checkpoint
from train.run.saved_config import read_config

HOSTS = ("a", "b")
PORT = 29533  # in namespaces of our own
SECONDS = 180.0
# forty images to a step, ten to a part: of two, normalised features are signs, and rounding flips them
OPTIONS = {"batch_size": 40, "bn_groups": 4, "base_lr": 1.0, "warmup_epochs": 0, "checkpoint_epochs": 0}
FEW, MANY = 4, 24  # steps; the start and the end cost the same in both
AGREEMENT = 0.1  # headers and acknowledgements, and the small exchanges that the model leaves out


class Cable:
    """A network namespace for each host, with one end of a cable in it."""

    def __init__(self) -> None:
        self._names = {host: f"dspnet{os.getpid()}{host}" for host in HOSTS}
        self._ends = {host: f"end{host}" for host in HOSTS}
        self.addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}

    def lay(self, cleaning: ExitStack) -> None:
        """Both hosts, until `cleaning` is closed.

        Raises subprocess.CalledProcessError, with the reason as its stderr, where that is not allowed.
        """
        for name in self._names.values():
            _run("ip", "netns", "add", name)
            cleaning.callback(_run, "ip", "netns", "del", name)  # which takes its end of the cable along
        (first, second), (a, b) = self._ends.values(), self._names.values()
        _run("ip", "link", "add", first, "netns", a, "type", "veth", "peer", "name", second, "netns", b)
        for host, name in self._names.items():
            end = self._ends[host]
            _run("ip", "-n", name, "address", "add", f"{self.addresses[host]}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", end, "up")

    def inside(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def environment(self, host: str) -> dict[str, str]:
        """What Gloo has to be told there."""
        return {"GLOO_SOCKET_IFNAME": self._ends[host]}

    def sent(self, host: str) -> int:
        """Bytes that have left this host."""
        counter = f"/sys/class/net/{self._ends[host]}/statistics/tx_bytes"
        return int(subprocess.check_output(self.inside(host, "cat", counter)))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or not dist.is_available():
        pytest.skip("needs the program ip, and PyTorch with torch.distributed")
    made = Cable()
    with ExitStack() as cleaning:
        try:
            made.lay(cleaning)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces take root: {error.stderr.decode().strip()}")
        yield made


def pretrain_on_both(cable: Cable, per_host: int, argv: list[str], name: str) -> dict[str, int]:
    """One job on both hosts; returns the bytes that each sent."""
    before = {host: cable.sent(host) for host in HOSTS}
    jobs = []
    for host in HOSTS:
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(HOSTS)}", f"--nproc-per-node={per_host}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={cable.addresses['a']}:{PORT}", f"--rdzv-id={name}"),
            # each must be told, as neither has a name that leads to its address
            *(f"--rdzv-conf=is_host={int(host == 'a')}", f"--local-addr={cable.addresses[host]}"),
        ]
        jobs.append(
            subprocess.Popen(
                cable.inside(host, *launcher, "-m", "train.pretrain", *argv),
                env={**ENVIRONMENT, **cable.environment(host)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [job.communicate(timeout=SECONDS)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    return {host: cable.sent(host) - before[host] for host in HOSTS}


def weights(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith((".weight", ".bias"))])


def trained(out: Path) -> torch.Tensor:
    return weights(checkpoint.load(checkpoint.newest_of_run(out))["model"])


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 2])
def test_two_hosts_train_as_one_process_and_send_what_the_model_says(cable: Cable, lab: Lab, per_host: int) -> None:
    sent = {}
    for steps in (FEW, MANY):
        argv = arguments(data=lab.images, out=lab.folder / f"hosts{steps}", **{**OPTIONS, "epochs": steps})
        sent[steps] = pretrain_on_both(cable, per_host, argv, f"{per_host}-{steps}")

    lab.run(out=lab.folder / "one", **{**OPTIONS, "epochs": FEW})
    config = read_config(lab.folder / "one", PretrainConfig)
    together, alone = trained(lab.folder / f"hosts{FEW}"), trained(lab.folder / "one")
    start = weights(build_model(config).state_dict())
    assert (together - alone).norm() <= 1e-3 * (alone - start).norm()

    # of a ring of ranks in order, one link leads from each host to the other
    expected = traffic(config, len(HOSTS) * per_host).sent
    for host in HOSTS:
        a_step = (sent[MANY][host] - sent[FEW][host]) / (MANY - FEW)
        assert a_step == pytest.approx(expected, rel=AGREEMENT), (host, a_step, expected)
