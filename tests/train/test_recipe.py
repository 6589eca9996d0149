"""Recipes: values of options that are not given, as functions of the numbers of images and steps."""

import json
import sys

import pytest
import timm
import yaml

from dspnet_fast.errors import InputError
from tests.commands import run
from train import pretrain
from train.cli import DONE, WRONG_INPUT, to_config
from train.config import PAPER, PretrainConfig
from train.pretraining import recipe
from train.pretraining.recipe import MAX_BATCH, MIN_BATCH, chosen, complete

IMAGES = (20, 100, 999, 3_000, 10_000, 50_000, 1_281_167)


def steps_of(config: PretrainConfig, images: int) -> int:
    return config.epochs * (images // config.batch_size)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("epochs", [None, 1, 3, 7, 30, 300])
def test_warm_up_is_at_most_a_tenth_of_the_run(images, epochs):
    config = complete(PretrainConfig(epochs=epochs), images)
    epoch_steps = images // config.batch_size
    assert round(config.warmup_epochs * epoch_steps) <= steps_of(config, images) / 10
    assert config.warmup_epochs <= 10
    assert round(config.warmup_epochs * epoch_steps) >= min(10 * epoch_steps, steps_of(config, images) // 10) - 1


@pytest.mark.parametrize("images", IMAGES)
def test_values_are_valid_and_cover_all_options(images):
    config = complete(PretrainConfig(), images)
    assert all(getattr(config, name) is not None for name in PAPER)
    assert config.batch_size <= images and 0.9 < config.tau < 1
    assert chosen(config, images) == {} and complete(config, images) == config


def test_batch_falls_until_there_are_enough_steps():
    batches = [complete(PretrainConfig(epochs=20), images).batch_size for images in (100_000, 10_000, 5_000, 1_000)]
    assert batches[0] == MAX_BATCH and batches[-1] == MIN_BATCH and batches == sorted(batches, reverse=True)
    steps = steps_of(complete(PretrainConfig(epochs=20), 10_000), 10_000)
    assert steps >= recipe.BYOL.steps


def test_batch_fits_ranks_micro_batches_and_groups():
    for options, ranks, unit in (({}, 3, 3), ({"grad_accum_steps": 4}, 2, 8), ({"bn_groups": 6}, 4, 12)):
        batch = complete(PretrainConfig(epochs=1, **options), 10_000, ranks).batch_size
        groups = options.get("bn_groups") or unit
        assert batch % unit == 0 and batch >= recipe.GROUP * groups
    assert complete(PretrainConfig(epochs=1), 50, ranks=8).batch_size == 48, "fewer images than 16 per group"


def test_epochs_fall_with_the_number_of_images():
    epochs = [complete(PretrainConfig(), images).epochs for images in IMAGES]
    assert epochs == sorted(epochs, reverse=True) and (epochs[0], epochs[-1]) == (1000, 100)


def test_peak_learning_rate_does_not_depend_on_the_batch():
    for batch in (32, 256, 4096):
        for network, dns, peak in (
            ("mobilenet_v3_large", "w0.50,w1.00", recipe.PEAK),
            ("resnet", "c8-d1111,c16-d1111", recipe.RESNET_PEAK),
        ):
            config = complete(PretrainConfig(network=network, dns=dns, batch_size=batch, epochs=10), 10_000)
            assert config.base_lr * batch / 256 == pytest.approx(peak)


def test_teacher_makes_runs_short_and_the_optimizer_adamw():
    for images, epochs, batch in ((3_000, 20, 64), (50_000, 3, 128), (1_281_167, 3, 256)):
        config = complete(PretrainConfig(teacher="efficientnet-lite0"), images)
        assert (config.optimizer, config.epochs, config.batch_size) == ("adamw", epochs, batch)
        assert config.base_lr * batch / 256 == pytest.approx(recipe.TAUGHT_PEAK) and config.weight_decay == 0.05
    assert complete(PretrainConfig(), 3_000).optimizer == PretrainConfig(recipe="paper").optimizer == "lars"
    given = complete(PretrainConfig(teacher="efficientnet-lite0", optimizer="lars"), 3_000)
    assert given.base_lr * given.batch_size / 256 == pytest.approx(recipe.PEAK)


def test_attention_makes_the_optimizer_adamw_and_the_peak_lower(monkeypatch):
    module = type(sys)("encoders")
    module.transformer = lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    monkeypatch.setitem(sys.modules, "encoders", module)
    for teacher in (None, "efficientnet-lite0"):
        given = PretrainConfig(network="encoders:transformer", dns="w0.50,w1.00", teacher=teacher)
        config = complete(given, 3_000)
        assert config.optimizer == "adamw" and config.weight_decay == 0.05
        assert config.base_lr * config.batch_size / 256 == pytest.approx(recipe.ATTENTION_PEAK)
        assert "lower because of attention" in chosen(given, 3_000)["base_lr"].reason
    lars = complete(PretrainConfig(network="encoders:transformer", dns="w0.50,w1.00", optimizer="lars"), 3_000)
    assert lars.base_lr * lars.batch_size / 256 == pytest.approx(recipe.PEAK)


def test_tau_rises_with_the_number_of_steps():
    taus = [complete(PretrainConfig(epochs=epochs, batch_size=100), 1_000).tau for epochs in (1, 20, 60, 200, 1000)]
    assert taus == sorted(taus) and taus[0] == recipe.MIN_TAU and taus[-1] == recipe.MAX_TAU
    assert taus[2] == pytest.approx(1 - 1 / 60, abs=1e-4)


def test_long_runs_have_the_papers_crops():
    scales = [complete(PretrainConfig(epochs=epochs, batch_size=100), 10_000).min_scale for epochs in (199, 200)]
    assert scales == [recipe.MIN_SCALE, PAPER["min_scale"]]


def test_given_options_win():
    given = {name: value / 2 for name, value in PAPER.items()} | {"epochs": 4, "batch_size": 8}
    config = complete(PretrainConfig(**given), 3_000)
    assert {name: getattr(config, name) for name in given} == given
    half = complete(PretrainConfig(batch_size=100), 3_000)
    assert half.batch_size == 100 and half.warmup_epochs == 10


def test_recipe_paper_has_the_papers_values_for_any_images():
    config = PretrainConfig(recipe="paper", tau=0.9)
    assert {name: getattr(config, name) for name in PAPER} == PAPER | {"tau": 0.9}
    with pytest.raises(InputError, match="--recipe must be one of auto, paper"):
        PretrainConfig(recipe="papier")


def test_unknown_number_of_images_needs_a_batch_size():
    with pytest.raises(InputError, match="give --batch-size, --train-images or --recipe paper"):
        complete(PretrainConfig(data="/nowhere"), None)
    assert complete(PretrainConfig(data="/nowhere", batch_size=64), None).batch_size == 64


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"epochs": 3, "warmup_epochs": 10}, "c8-d1111, c8-d1121"),
        ({"epochs": 3, "full_only_epochs": 3, "warmup_epochs": 1}, "c8-d1111, c8-d1121"),
        ({"subnets_per_step": 2}, "c8-d1121"),
        ({"epochs": 3, "warmup_epochs": 2}, None),
        ({"epochs": 3, "warmup_epochs": 10, "dns": "c8-d1111"}, None),
    ],
)
def test_subnet_without_a_step_is_an_error(small, options, missing):
    config = small(**options)
    if missing is None:
        recipe.check_sampling(config, 80)
        return
    with pytest.raises(InputError, match=f"^{missing} would not be trained"):
        recipe.check_sampling(config, 80)


def test_subnet_that_is_not_drawn_by_chance_is_an_error(small):
    """One step draws one of the two networks between; the draw is that of the training."""
    family = ("c8-d1111", "c8-d1121", "c12-d1121", "c16-d2121")
    config = small(dns=",".join(family), epochs=1, batch_size=80, warmup_epochs=0)
    with pytest.raises(InputError, match=r"^c(8|12)-d1121 would not be trained: of 1 steps"):
        recipe.check_sampling(config, 80)
    recipe.check_sampling(small(dns=",".join(family), epochs=20, batch_size=80, warmup_epochs=0), 80)


def test_untrained_subnet_is_refused_before_anything_is_written(arguments, tmp_path, capsys):
    for flags in ((), ("--dry-run",)):
        assert (
            run(pretrain, *arguments(warmup_epochs=10), *flags) == WRONG_INPUT
            and "fewer --warmup-epochs" in capsys.readouterr().err
        )
    assert not (tmp_path / "run").exists()


def test_chosen_values_are_printed_and_saved(arguments, tmp_path, capsys):
    left_open = dict.fromkeys((*PAPER, "recipe")) | {"epochs": 3, "probe_epochs": 0}
    assert run(pretrain, *arguments(**left_open)) == DONE
    shown = capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    expected = complete(PretrainConfig(network="resnet", dns="c8-d1111,c16-d1111", epochs=3), 80)
    assert {name: saved[name] for name in PAPER} == {name: getattr(expected, name) for name in PAPER}
    assert "recipe  --tau 0.97: " in shown and "--epochs" not in shown
    config = to_config(PretrainConfig, pretrain.make_parser().parse_args(["--config", f"{tmp_path}/run/config.yaml"]))
    assert chosen(config, 10**6) == {}, "the file re-runs with the same values, whatever the images"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == steps_of(expected, 80)
