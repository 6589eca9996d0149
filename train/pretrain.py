"""`python -m train.pretrain`: pretrain a family of networks on unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dspnet_fast.errors import InputError

from . import cli
from .config import PretrainConfig
from .costs import dry_run
from .distributed.process_group import destroy_process_group
from .pretraining.run import PretrainRun
from .run.interruption import NOTHING
from .run.run_directory import after_ctrl_c
from .run.saved_config import with_saved_config

DESCRIPTION = """\
Pretrain a family of networks that share their weights, on images without labels. Writes the configuration, metrics
and checkpoints to the run directory --out. Options that are not given are chosen for the number of images (--recipe
auto), or are those of the paper (--recipe paper).

Afterwards evaluate the networks with dspnet-evaluate, fine-tune them with dspnet-finetune, save them for deployment
with dspnet-export, and see all results on the page that dspnet-report writes."""
EXAMPLE = """\
  dspnet-pretrain --fast-kernels --data fashion-mnist --network resnet --stem small --image-size 28 \\
      --dns c16-d1111,c16-d2222,c32-d2222 --epochs 5 --warmup-epochs 1 --out runs/first
  dspnet-pretrain --out runs/first --resume
  dspnet-pretrain --config recipes/dspnet_mobilenet-v3_imagenet_300e.yaml --dry-run"""


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Pretrain a family of networks: the Python form of this command.

    Args:
        config: all options; `config.out` names the run directory.
        resume: continue the run in `config.out`.

    Returns:
        The run directory.

    Raises:
        InputError: if options, images or run directory cannot be used.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
        SystemExit: after SIGTERM, SIGUSR1 or SIGHUP, when a checkpoint has been saved.

    Example:
        >>> config = PretrainConfig(data="photos", dns="w0.50,w1.00", epochs=20, out="runs/photos")
        >>> run = pretrain(config)  # doctest: +SKIP
    """
    if not config.out:
        raise InputError("--out is missing: name a new folder for this run, such as --out runs/first")
    try:
        PretrainRun(config, resume).run()
    except SystemExit:  # all ranks agreed to stop
        destroy_process_group()
        raise
    destroy_process_group()  # skipped after an error: NCCL would block on the other ranks
    return Path(config.out)


def make_parser() -> cli.ArgumentParser:
    """The parser of the command."""
    parser = cli.parser("pretrain", DESCRIPTION, EXAMPLE, "[options] --out DIR")
    cli.add_config_file(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its configuration")
    parser.add_argument("--dry-run", action="store_true", help="check the options, print the cost of the run, and exit")
    cli.add_options(parser, PretrainConfig)
    return parser


def _main(argv: Sequence[str]) -> None:
    options = make_parser().parse_args(with_saved_config(argv, PretrainConfig))
    config = cli.to_config(PretrainConfig, options)
    if options.dry_run:
        dry_run.show(dry_run.estimate(config, options.resume))
        return
    try:
        pretrain(config, options.resume)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(after_ctrl_c(Path(config.out))) from interrupt


main = cli.command(_main, several_ranks=True, interrupted=NOTHING)

if __name__ == "__main__":
    main()
