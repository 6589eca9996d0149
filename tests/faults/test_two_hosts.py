"""Two hosts, emulated by network namespaces: weights equal to one rank's, and the traffic of the cost model."""

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
PORT = 29533  # in separate namespaces
TIMEOUT = 180.0  # seconds
# 40 images per step, 10 per batch norm group: features normalised over 2 images are +-1, and rounding flips them
OPTIONS = {"batch_size": 40, "bn_groups": 4, "base_lr": 1.0, "warmup_epochs": 0, "checkpoint_epochs": 0}
FEW, MANY = 4, 24  # steps; the difference excludes start and end
TOLERANCE = 0.1  # headers, acknowledgements, and small messages that the model omits


class Network:
    """A network namespace for each host, connected by a pair of virtual interfaces."""

    def __init__(self) -> None:
        self._names = {host: f"dspnet{os.getpid()}{host}" for host in HOSTS}
        self._interfaces = {host: f"end{host}" for host in HOSTS}
        self.addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}

    def create(self, cleaning: ExitStack) -> None:
        """Create both hosts, until `cleaning` is closed.

        Raises:
            subprocess.CalledProcessError: without root; its stderr has the reason.
        """
        for name in self._names.values():
            _run("ip", "netns", "add", name)
            cleaning.callback(_run, "ip", "netns", "del", name)  # also deletes its interface
        (first, second), (a, b) = self._interfaces.values(), self._names.values()
        _run("ip", "link", "add", first, "netns", a, "type", "veth", "peer", "name", second, "netns", b)
        for host, name in self._names.items():
            interface = self._interfaces[host]
            _run("ip", "-n", name, "address", "add", f"{self.addresses[host]}/24", "dev", interface)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", interface, "up")

    def inside(self, host: str, *command: str) -> list[str]:
        """Return the command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def environment(self, host: str) -> dict[str, str]:
        """Return the environment variables for Gloo on a host."""
        return {"GLOO_SOCKET_IFNAME": self._interfaces[host]}

    def sent(self, host: str) -> int:
        """Return the bytes that a host has sent."""
        counter = f"/sys/class/net/{self._interfaces[host]}/statistics/tx_bytes"
        return int(subprocess.check_output(self.inside(host, "cat", counter)))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or not dist.is_available():
        pytest.skip("needs the program ip, and PyTorch with torch.distributed")
    made = Network()
    with ExitStack() as cleaning:
        try:
            made.create(cleaning)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces need root: {error.stderr.decode().strip()}")
        yield made


def pretrain_on_both(network: Network, per_host: int, argv: list[str], name: str) -> dict[str, int]:
    """Run one job on both hosts; return the bytes that each sent."""
    before = {host: network.sent(host) for host in HOSTS}
    jobs = []
    for host in HOSTS:
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(HOSTS)}", f"--nproc-per-node={per_host}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={network.addresses['a']}:{PORT}", f"--rdzv-id={name}"),
            # explicit, as neither address has a host name
            *(f"--rdzv-conf=is_host={int(host == 'a')}", f"--local-addr={network.addresses[host]}"),
        ]
        jobs.append(
            subprocess.Popen(
                network.inside(host, *launcher, "-m", "train.pretrain", *argv),
                env={**ENVIRONMENT, **network.environment(host)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        output = [job.communicate(timeout=TIMEOUT)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(output)
    return {host: network.sent(host) - before[host] for host in HOSTS}


def weights(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith((".weight", ".bias"))])


def trained(out: Path) -> torch.Tensor:
    return weights(checkpoint.load(checkpoint.newest_of_run(out))["model"])


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 2])
def test_two_hosts_match_one_process_and_the_cost_model(network: Network, lab: Lab, per_host: int) -> None:
    sent = {}
    for steps in (FEW, MANY):
        argv = arguments(data=lab.images, out=lab.folder / f"hosts{steps}", **{**OPTIONS, "epochs": steps})
        sent[steps] = pretrain_on_both(network, per_host, argv, f"{per_host}-{steps}")

    lab.run(out=lab.folder / "one", **{**OPTIONS, "epochs": FEW})
    config = read_config(lab.folder / "one", PretrainConfig)
    together, alone = trained(lab.folder / f"hosts{FEW}"), trained(lab.folder / "one")
    start = weights(build_model(config).state_dict())
    assert (together - alone).norm() <= 1e-3 * (alone - start).norm()

    # a ring of ranks in order has one link from each host to the other
    expected = traffic(config, len(HOSTS) * per_host).sent
    for host in HOSTS:
        per_step = (sent[MANY][host] - sent[FEW][host]) / (MANY - FEW)
        assert per_step == pytest.approx(expected, rel=TOLERANCE), (host, per_step, expected)
