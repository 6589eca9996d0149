"""Programs that show the metrics of a run: TensorBoard, Weights & Biases and MLflow (`--log-to`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dspnet_fast.errors import InputError

from .fingerprint import digest

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "dspnet-fast"  # W&B's project, MLflow's experiment


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Record a number."""
        ...

    def close(self) -> None:
        """Send the buffered numbers."""
        ...


def names_of(log_to: str) -> list[str]:
    """The names in `--log-to`; InputError for an unknown one."""
    names = [name.strip() for name in log_to.split(",") if name.strip() and log_to != "none"]
    for name in names:
        if name not in PACKAGES:
            raise InputError(f"--log-to {name}: give some of {', '.join(PACKAGES)}, separated by commas, or none")
    return names


def require(log_to: str) -> None:
    """Raise InputError if a package is missing."""
    for name in names_of(log_to):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"--log-to {name} needs its package, not installed here: pip install 'dspnet-fast[{name}]'"
            )


def open_trackers(names: Sequence[str], out: Path, step: int) -> list[Tracker]:
    """Open trackers for the run in `out`, which continues at `step`. A resumed run continues the same records."""
    kinds: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}
    return [kinds[name](out, step) for name in names]


def _identifier(out: Path) -> str:
    return f"{out.name}-{digest(str(out.resolve()))}"


class _TensorBoard:
    def __init__(self, out: Path, step: int) -> None:
        # takes seconds, which commands that only read a run should not wait
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """W&B's own environment variables choose server, project and mode, such as WANDB_MODE=offline."""

    def __init__(self, out: Path, step: int) -> None:
        import wandb

        self._run = wandb.init(project=PROJECT, name=out.name, id=_identifier(out), dir=str(out), resume="allow")

    def scalar(self, name: str, value: float, step: int) -> None:
        self._run.log({name: value}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLFLOW_TRACKING_URI chooses the server."""

    def __init__(self, out: Path, step: int) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        tag = {"dspnet_run": _identifier(out)}
        runs = self._client.search_runs([experiment], f"tags.dspnet_run = '{_identifier(out)}'") if step else []
        run = runs[0] if runs else self._client.create_run(experiment, tags=tag, run_name=out.name)
        self._run = run.info.run_id

    def scalar(self, name: str, value: float, step: int) -> None:
        self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)
