"""`python -m train.select`: verify the kernels on this device and race the formulations, ahead of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspnet_fast import plugins, verdicts
from dspnet_fast.errors import InputError
from dspnet_fast.ops import registry
from dspnet_fast.verdicts import Verdict
from dspnet_fast.verification.supervisor import CALL_SECONDS

from . import cli
from .config import PretrainConfig
from .costs.dry_run import known_images, known_size
from .pretraining import recipe
from .run.device import check_fast_kernels, choose_device
from .run.interruption import NOTHING
from .run.options import check_options, count, option, positive
from .run.tables import Table
from .selection.recording import shape_of
from .selection.selection import key_of, select
from .teachers.teacher import expected_facts, with_teacher

DESCRIPTION = """\
Select the kernels that dspnet-pretrain --fast-kernels uses on this device, ahead of a run with the same options;
those that do not change the steps, such as --out, have no effect. Every provider of an operator (an implementation, in
C++, Triton or CUDA) is compared with the operator's specification on the calls of the run, in a process of its own, so
that a crash does no harm. Then whole training steps are timed in alternation: eager, in plain PyTorch; fused, by the
operators; and eager again, whose difference from eager shows the precision of the times. Fused steps are selected if
they are faster by 5 % and by three times this difference.

The verdict is kept in ~/.cache/dspnet-fast (or $XDG_CACHE_HOME) and used by all later runs with the same device,
software, networks and batch; dspnet-info lists the kept verdicts. Without one, runs of ten minutes or more on
a CPU, fifty on a GPU, select when they start."""
EXAMPLE = """\
  dspnet-select --network mobilenet_v3_large --dns w0.50,w0.75,w1.00 --image-size 96 --batch-size 256
  dspnet-select --config recipes/dspnet_mobilenet-v3_imagenet_300e.yaml --ranks 8 --again"""


@dataclass(kw_only=True)
class SelectOptions:
    """Options of `train.select` besides those of the run."""

    again: bool = option(False, "select again, even if the cache has a verdict")
    ranks: int = count(1, "number of processes (ranks) that the run will have")
    call_seconds: float = positive(
        CALL_SECONDS, "longest time of an operator's call, in seconds; a provider that takes longer is refused"
    )


def make_parser() -> cli.ArgumentParser:
    """The parser of the command."""
    parser = cli.parser("select", DESCRIPTION, EXAMPLE)
    cli.add_config_file(parser)
    cli.add_options(parser, SelectOptions)
    cli.add_options(parser, PretrainConfig)
    return parser


def show(verdict: Verdict) -> None:
    """Print a verdict."""
    found = [(name, provider, o) for name, outcomes in verdict.operators.items() for provider, o in outcomes.items()]
    if found:
        title = f"operators on {verdict.key['device']}; error: the largest, as a share of the error rule's bound"
        rows = [
            [name, provider, str(o.calls), f"{o.error:.2f}" if o.calls else "", "verified" if o.verified else "refused"]
            for name, provider, o in found
        ]
        Table(title, ["operator", "provider", "calls", "error", "result"], rows).show()
    for name, provider, outcome in found:
        if not outcome.verified:
            print(f"{name} by {provider} is refused: {outcome.reason}")
    if (race := verdict.race) is not None:
        rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in race.seconds.items()]
        rows.append(["eager again", f"{1e3 * race.control:.1f}"])
        title = f"step of {race.images} images, median of {race.rounds} rounds"
        Table(title, ["formulation", "ms"], rows).show()
    print(f"{verdict.formulation}: {verdict.reason}")


def _main(argv: Sequence[str]) -> None:
    parsed = make_parser().parse_args(argv)
    options, config = cli.to_config(SelectOptions, parsed), cli.to_config(PretrainConfig, parsed)
    check_options(options)
    config = recipe.complete(config, known_images(config, known_size(config.data)), options.ranks)
    config = with_teacher(config, expected_facts(config))
    if policy := registry.policy_of_environment():
        raise InputError(f"DSPNET_KERNELS={policy} overrides every selection: unset it")
    plugins.load(config.plugins)
    device = choose_device(config.device)
    check_fast_kernels(device)
    key, shape = key_of(device, config.tf32, config.plugins, config.cudnn), shape_of(config, options.ranks)
    verdict = None if options.again else verdicts.read(key, shape)
    if verdict is None:
        verdict = select(config, device, options.ranks, call_seconds=options.call_seconds)
    show(verdict)
    if verdicts.read(key, shape) == verdict:
        print(f"kept in {verdicts.path_of(key, shape)} on {verdict.date}")


main = cli.command(_main, interrupted=NOTHING)

if __name__ == "__main__":
    main()
