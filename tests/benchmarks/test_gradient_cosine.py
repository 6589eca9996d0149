"""Cosines of the subnets' gradients: against the formula, and of a small run."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gradient_cosine import agreement, gradients_of, main, stages_of
from train.config import PretrainConfig
from train.pretraining.run import PretrainRun
from train.pretraining.trainer import Trainer

OPTIONS = {
    "recipe": "paper",
    "network": "resnet",
    "dns": "c8-d1111,c12-d1111,c16-d1111",
    "stem": "small",
    "image_size": 12,
    "hidden_features": 16,
    "out_features": 8,
    "epochs": 1,
    "batch_size": 8,
    "warmup_epochs": 0,
    "workers": 0,
    "probe_epochs": 0,
    "log_to": "none",
}


def test_agreement_equals_the_formula_on_the_elements_that_the_subnet_uses():
    small = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    large = torch.tensor([4.0, 3.0, 5.0, 0.0], dtype=torch.float64)
    batches = [{"s": {"stem": small}, "l": {"stem": large}}, {"s": {"stem": -2 * small}, "l": {"stem": large}}]
    found = {quantity: stages["stem"] for quantity, stages in agreement(batches).items()}
    torch.testing.assert_close(found["cosine with s"], torch.tensor([24 / 25, -24 / 25], dtype=torch.float64))
    torch.testing.assert_close(found["norm of s"], torch.tensor([1.0, 2.0], dtype=torch.float64))
    sums = [(7.0, 7.0, 5.0), (-2.0, -5.0, 5.0)]
    expected = [(4 * a + 3 * b + 5 * c) / (50 * (a * a + b * b + c * c)) ** 0.5 for a, b, c in sums]
    torch.testing.assert_close(found["cosine with sum"], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found["with next batch"], torch.ones(1, dtype=torch.float64))


def test_gradients_are_those_of_each_subnet_alone():
    trainer = Trainer(PretrainConfig(**OPTIONS), 1, torch.device("cpu"))
    images = torch.randn(16, 3, 12, 12)
    found = gradients_of(trainer, images, None, 1.0)
    model = trainer.model
    stages = stages_of(model.online, model.online.encoder.stages)
    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "projector", "predictor"]
    assert sum(map(len, stages.values())) == len(list(model.online.parameters()))
    targets = model.targets(images)
    for subnet in model.family:
        trainer.flat_buffers.grads.zero_()
        model.loss(images, targets, subnet).backward()
        for stage, parameters in stages.items():
            expected = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
            torch.testing.assert_close(found[subnet.name][stage], expected, rtol=1e-4, atol=1e-6)


def test_table_of_a_run_has_every_stage(tmp_path, monkeypatch, capsys):
    for index in range(16):
        path = tmp_path / "images" / "train" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "run"
    PretrainRun(PretrainConfig(**OPTIONS, data=str(tmp_path / "images"), out=str(out)), resume=False).run()
    monkeypatch.setattr("sys.argv", ["gradient_cosine", str(out), "--batches", "3"])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    main()
    shown = capsys.readouterr().out
    assert all(f" {stage} " in shown for stage in ("stem", "layer1", "layer4", "projector", "predictor"))
    assert "cosine with c12-d1111" in shown and "nan" not in shown
    monkeypatch.setattr("sys.argv", ["gradient_cosine", str(tmp_path), "--batches", "3"])
    with pytest.raises(SystemExit, match="2"):
        main()
