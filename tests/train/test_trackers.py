"""Programs that show the metrics: each is opened once, resumed runs continue their records."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspnet_fast.errors import InputError
from train.pretraining.run import PretrainRun
from train.run import trackers
from train.run.log import RunLog

METRICS = {"loss": {"w0.50": 2.5}, "learning_rate": 0.1}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="MLflow is not installed")
def test_mlflow_continues_the_record_of_a_resumed_run(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for step in (0, 1):
        log = RunLog(tmp_path, step, ["mlflow"])
        log.metrics(step + 1, METRICS)
        log.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(trackers.PROJECT).experiment_id
    (run,) = client.search_runs([experiment])
    history = client.get_metric_history(run.info.run_id, "loss/w0.50")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.5), (2, 2.5)]
    assert run.data.metrics["learning_rate"] == 0.1


def test_wandb_receives_each_metric_and_is_told_which_run_it_is(tmp_path, monkeypatch):
    started, logged = [], []
    record = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.append(options) or record))
    for step in (0, 1):
        log = RunLog(tmp_path, step, ["wandb"])
        log.metrics(step + 1, METRICS)
        log.close()
    assert logged[:3] == [(1, {"loss/w0.50": 2.5}), (1, {"learning_rate": 0.1}), "finished"]
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["dir"] == str(tmp_path)


def test_run_without_trackers_writes_metrics_alone(tmp_path):
    log = RunLog(tmp_path, 0, trackers.names_of("none"))
    log.metrics(1, METRICS)
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "train.log"}


def test_unknown_tracker_and_missing_package_are_refused_before_anything_is_written(small, monkeypatch):
    with pytest.raises(InputError, match="--log-to comet: give some of tensorboard, wandb, mlflow"):
        PretrainRun(small(log_to="tensorboard,comet"), resume=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(InputError, match="--log-to wandb needs its package, .* pip install 'dspnet-fast\\[wandb\\]'"):
        PretrainRun(small(log_to="wandb"), resume=False)
    assert not Path(small().out).exists()
