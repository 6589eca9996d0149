"""What `--overlap-all-reduce` saves: steps of two ranks on two hosts, with cables of given speeds. Takes root, for the
hosts.

Steps with and without it take turns; between them the same step without any exchange, and the exchange alone. Where the
heads' gradients take longer to send than those of the full network's encoder to compute, it can hide the latter's time
at most. Medians of rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from dspnet_fast.errors import InputError
from dspnet_fast.machine import cpu_model
from dspnet_fast.ops import registry
from train import cli
from train.config import PretrainConfig
from train.costs.communication import traffic
from train.distributed.process_group import SINGLE_PROCESS as NO_OTHERS
from train.distributed.process_group import join, leave
from train.pretraining.trainer import Trainer
from train.run.progress import Monitor

from .cable import HOSTS, Cable

PORT = 29534  # in namespaces of our own
STEPS_OF_A_RUN = 100_000  # so many that learning rate and tau stay what they are
SINGLE_PROCESS, EXCHANGE, AFTER, OVERLAPPED = (
    "step without exchange",
    "exchange alone",
    "step",
    "step with --overlap-all-reduce",
)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet", help="resnet or mobilenet_v3 [%(default)s]")
    parser.add_argument("--dns", default="c32-d1111,c64-d2222", help="subnets, all in every step [%(default)s]")
    parser.add_argument("--image-size", type=int, default=64, help="height and width of a view [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, help="images of both ranks together [%(default)s]")
    parser.add_argument("--gbit", default="10,1", help="speeds of the cable, 10^9 bits a second [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each [%(default)s]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    if "RANK" in os.environ:
        print(json.dumps(seconds(options)))
        return
    config = configuration(options)
    sent = traffic(config, len(HOSTS))
    console = Console()
    console.print(
        f"{cpu_model()}, one thread a rank; {config.network} {config.dns}, {config.batch_size} images of "
        f"{config.image_size} px; {sent.gradient / 1e6:.1f} MB of gradient sent by each rank in a step"
    )
    table = Table("Gbit/s", *(f"{name}, ms" for name in (SINGLE_PROCESS, EXCHANGE, AFTER, OVERLAPPED)), "x")
    speeds = [float(speed) for speed in options.gbit.split(",")]
    with Monitor("cables", len(speeds)) as monitor:
        for speed in speeds:
            found = on_two_hosts(speed, argv)
            ratio = f"{found[AFTER] / found[OVERLAPPED]:.2f}"
            table.add_row(f"{speed:g}", *(f"{1e3 * s:.0f}" for s in found.values()), ratio)
            monitor.advance()
    console.print(table)


def configuration(options: argparse.Namespace) -> PretrainConfig:
    """A run whose every step takes the same subnets."""
    return PretrainConfig(
        network=options.network,
        dns=options.dns,
        image_size=options.image_size,
        batch_size=options.batch_size,
        subnets_per_step=max(2, len(options.dns.split(","))),
        full_only_epochs=0,
        warmup_epochs=0,
        epochs=1,
    )


def on_two_hosts(gbit: float, argv: Sequence[str]) -> dict[str, float]:
    """What rank 0 measures, over a cable of this speed."""
    cable = Cable()
    with ExitStack() as cleaning:
        try:
            cable.lay(cleaning, gbit)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error).encode()).decode().strip()
            raise InputError(f"hosts take root, and the programs ip and tc: {reason}") from error
        processes = []
        for rank, host in enumerate(HOSTS):
            own = {"RANK": str(rank), "WORLD_SIZE": str(len(HOSTS)), "OMP_NUM_THREADS": "1"}
            meeting = {"MASTER_ADDR": cable.addresses[HOSTS[0]], "MASTER_PORT": str(PORT)}
            command = cable.inside(host, sys.executable, "-m", __spec__.name, *argv)
            environment = {**os.environ, **cable.environment(host), **own, **meeting}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            cleaning.callback(process.terminate)
            processes.append(process)
        said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise InputError("a rank has failed: it said why above")
    found: dict[str, float] = json.loads(said[0].splitlines()[-1])
    return found


def seconds(options: argparse.Namespace) -> dict[str, float]:
    """Medians, of this rank."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    ranks = join(device)
    registry.fast_kernels()
    config = configuration(options)
    after, overlapped, alone = (
        Trainer(of, STEPS_OF_A_RUN, device, among)
        for of, among in [
            (config, ranks),
            (replace(config, overlap_all_reduce=True), ranks),
            (replace(config, batch_size=config.batch_size // ranks.size), NO_OTHERS),
        ]
    )
    shape = (2 * config.batch_size // ranks.size, 3, config.image_size, config.image_size)
    batch = torch.randint(256, shape, dtype=torch.uint8)
    gradient = torch.zeros_like(after.flat_buffers.grads)
    ways: dict[str, Callable[[], object]] = {
        SINGLE_PROCESS: lambda: alone.train_step(batch),
        EXCHANGE: lambda: ranks.average(gradient),
        AFTER: lambda: after.train_step(batch),
        OVERLAPPED: lambda: overlapped.train_step(batch),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            ranks.wait()
            began = time.perf_counter()
            way()
            if turn:  # not the first one
                samples[name].append(time.perf_counter() - began)
    leave()
    return {name: statistics.median(taken) for name, taken in samples.items()}


if __name__ == "__main__":
    cli.run(main)
