"""Where operators are timed, and in what: the CPU and fp32, unless the environment says otherwise.

DSPNET_BENCH_DEVICE: cpu or cuda. DSPNET_BENCH_DTYPE: fp32 or bf16, of activations; weights are fp32 either way.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

DEVICE = torch.device(os.environ.get("DSPNET_BENCH_DEVICE", "cpu"))
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}[os.environ.get("DSPNET_BENCH_DTYPE", "fp32")]


def synchronized(run: Callable[[], object]) -> Callable[[], object]:
    """`run`, returning only when its work is done: on a GPU recorded as a graph, so that launches are not timed.

    What cannot be recorded is launched each time.
    """
    if DEVICE.type == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        again: Callable[[], object] = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        again = run

    def run_and_wait() -> None:
        again()
        torch.cuda.synchronize()

    return run_and_wait


def name() -> str:
    """What the times are of."""
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {str(DTYPE).removeprefix('torch.')}"
    return f"{torch.get_num_threads()} threads, {str(DTYPE).removeprefix('torch.')}"
