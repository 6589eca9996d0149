"""Compares the launches of training steps with those that train/pretraining/ahead.py records, without a GPU.

The steps run on CPU tensors, with the memory layout that they have on a GPU; launches are observed instead of executed.
Triton's own keys of specialised kernels are compared. Prints {case: [launches of the step, of which not recorded]} and
the results of a pool of processes: [kernels, of which found in the cache afterwards, lines that it reported].
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from triton import knobs
from triton.runtime.jit import compute_cache_key

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(shared_memory_per_block_optin=227 << 10)

from dspnet_fast.kernels import ahead, launch  # noqa: E402

from dspnet_fast.ops import ahead as pool  # noqa: E402
from dspnet_fast.ops import registry  # noqa: E402
from train.config import PretrainConfig  # noqa: E402
from train.pretraining.ahead import step_launches  # noqa: E402
from train.pretraining.trainer import Trainer  # noqa: E402

SMALL = {
    "recipe": "paper",
    "hidden_features": 16,
    "out_features": 8,
    "batch_size": 4,
    "full_only_epochs": 0.0,
    "probe_epochs": 0.0,
}
CASES = {
    "mobilenet bf16": {"dns": "w0.35,w0.50,w0.75", "precision": "bf16", "image_size": 32},
    "mobilenet fp32, 2 micro-batches": {"dns": "w0.50,w0.75", "image_size": 32, "grad_accum_steps": 2},
    "resnet bf16, momentum2": {
        **{"network": "resnet", "dns": "c8-d1111,c16-d1111", "stem": "small", "image_size": 12},
        **{"precision": "bf16", "momentum_bn": "momentum2"},
    },
    "resnet tf32, no momentum": {
        **{"network": "resnet", "dns": "c8-d1111,c12-d1211", "image_size": 32, "tf32": True, "momentum_bn": "off"},
    },
}


def key(kernel, arguments, options):
    """What Triton compiles a kernel for."""
    binder = kernel.device_caches[0][-1]
    _, specialization, parsed = binder(*arguments, **options, debug=False, instrumentation_mode="")
    return kernel.fn.__name__, compute_cache_key({}, specialization, dict(sorted(parsed.items())))


def launches_of_step(config):
    """The launches of a step on the CPU that trains all subnets."""
    found = []
    trainer = Trainer(replace(config, subnets_per_step=len(config.names())), 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    size = 2 * config.batch_size, 3, config.image_size, config.image_size
    with launch.observed(lambda *observed: found.append(observed)):
        trainer.train_step(torch.randint(256, size, dtype=torch.uint8, generator=generator))
    return found


def main():
    ahead.set_target(90)
    registry.set_policy("triton")
    for operator in registry.operators.values():
        if "triton" in operator.providers:
            operator.providers["triton"] = replace(operator.providers["triton"], devices=("cuda", "cpu"))
    missing = {}
    for name, options in CASES.items():
        config = PretrainConfig(**(SMALL | options))
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        recorded = step_launches(config)
        known = {key(r.jit_function(), map(ahead.argument, r.arguments), dict(r.options)) for r in recorded}
        launched = launches_of_step(config)
        missing[name] = [len(launched), [str(k) for k in {key(*observed) for observed in launched} - known]]
    hits, lines = [], []
    distinct = {ahead.Launch.of(*observed): observed for observed in launched}
    chosen = [launch for launch in distinct if "moments" in launch.kernel][:4]
    broken = ahead.Launch(chosen[0].kernel, chosen[0].arguments, (*chosen[0].options, ("BLOCK", 1)))
    results = pool.compile_launches([*chosen, broken], (9, 0), lines.append, processes=2)
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    for launch_ in chosen:
        kernel, arguments, options = distinct[launch_]
        kernel.warmup(*arguments, grid=(1,), **options)
    print(json.dumps({"missing": missing, "pool": [len(results), sum(hits), lines]}))


if __name__ == "__main__":
    main()
