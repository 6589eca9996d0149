"""Two hosts on one machine: network namespaces joined by a cable, which can be as slow as a real one. Takes root."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

HOSTS = ("a", "b")
BURST, LATENCY = "256kb", "20ms"  # what a slow cable lets through at once, and keeps waiting at most


class Cable:
    """A network namespace for each host, with one end of a cable in it."""

    def __init__(self) -> None:
        self._names = {host: f"dspnet{os.getpid()}{host}" for host in HOSTS}
        self._ends = {host: f"end{host}" for host in HOSTS}
        self.addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}

    def lay(self, cleaning: ExitStack, gbit: float | None = None) -> None:
        """Both hosts, until `cleaning` is closed. gbit: 10^9 bits per second in each direction; by default no limit.

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
            if gbit is not None:
                limit = ("rate", f"{gbit * 1e9:.0f}bit", "burst", BURST, "latency", LATENCY)
                _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *limit)

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
