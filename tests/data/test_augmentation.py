"""BYOL's views: the sampled parameters follow the specification, and each operation matches its reference.

The rates are measured on a fixed seed and compared within 4 standard deviations of a binomial count.
"""

import dataclasses
import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dspnet_fast.errors import InputError
from train.data.views import augmentation, torchvision_backend
from train.data.views.augmentation import (
    JITTER,
    NUMBERS_PER_VIEW,
    ViewParameters,
    ViewSpec,
    byol,
    sample_view,
    supervised,
    uniform_numbers,
)
from train.data.views.torchvision_backend import evaluation_view

NOTHING = ViewSpec(
    image_size=16,
    min_scale=1.0,
    ratio=(1.0, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    grey_probability=0.0,
    blur_probability=0.0,
    blur_kernel=3,
    blur_sigma=(1.0, 1.0),
    solarize_probability=0.0,
)


def build(view: ViewSpec):
    """Return a function that computes a view of an image with numbers from torch's global generator."""
    return lambda image: torchvision_backend.augment(
        view, sample_view(view, torch.rand(NUMBERS_PER_VIEW).tolist(), image.height, image.width), image
    )


def only(**fields) -> ViewSpec:
    """A distribution that keeps a square image of 16 pixels unchanged except for these fields."""
    return dataclasses.replace(NOTHING, **fields)


def colours(size: int = 16, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def share_changed(view: ViewSpec, image: Image.Image, n: int = 600) -> float:
    torch.manual_seed(0)
    same, drawn = F.pil_to_tensor(image), build(view)
    return sum(not torch.equal(drawn(image), same) for _ in range(n)) / n


def assert_rate(measured: float, expected: float, n: int = 600) -> None:
    assert abs(measured - expected) <= 4 * math.sqrt(expected * (1 - expected) / n), (measured, expected)


def test_byol_views_have_the_published_distributions():
    first, second = byol(224)
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
    assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)
    for view in (first, second):
        assert (view.min_scale, view.max_scale, view.ratio) == (0.08, 1.0, (3 / 4, 4 / 3))
        assert (view.flip_probability, view.jitter_probability, view.grey_probability) == (0.5, 0.8, 0.2)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.blur_kernel, view.blur_sigma, view.solarize_threshold) == (23, (0.1, 2.0), 128)
    assert byol(224, min_scale=0.3)[0].min_scale == 0.3


def test_supervised_view_is_crop_and_flip_only():
    view = supervised(224, min_scale=0.2)
    assert (view.image_size, view.min_scale, view.flip_probability) == (224, 0.2, 0.5)
    for uniform in uniform_numbers(0, 0, 0, views=50):
        drawn = sample_view(view, uniform, 300, 400)
        assert (drawn.jitter, drawn.grey, drawn.sigma, drawn.solarize) == ((), False, 0.0, False)
        assert drawn.box == sample_view(byol(224, 0.2)[0], uniform, 300, 400).box


@pytest.mark.parametrize(("size", "kernel"), [(448, 45), (224, 23), (128, 13), (96, 9), (32, 3), (28, 1), (8, 1)])
def test_blur_scales_with_image_size(size, kernel):
    for view in byol(size):
        assert view.blur_kernel == kernel
        assert view.blur_sigma == pytest.approx((0.1 * size / 224, 2.0 * size / 224))


@pytest.mark.parametrize(
    "call", [lambda: byol(7), lambda: evaluation_view(0), lambda: byol(32, 0), lambda: byol(32, 2)]
)
def test_invalid_sizes_raise_input_error(call):
    with pytest.raises(InputError, match="give"):
        call()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("source", [(28, 28), (300, 200), (1, 1), (1, 90)])
@pytest.mark.parametrize("size", [28, 32, 96])
def test_output_is_uint8_with_the_channels_of_the_image(mode, source, size):
    image = Image.new(mode, source)
    for drawn in [*(build(view) for view in byol(size)), evaluation_view(size)]:
        pixels = drawn(image)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (1 if mode == "L" else 3, size, size)


def test_identity_parameters_change_nothing():
    assert share_changed(NOTHING, colours(), n=5) == 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("field", "probability"),
    [("flip_probability", 0.5), ("jitter_probability", 0.8), ("blur_probability", 0.1), ("solarize_probability", 0.2)],
)
def test_operation_rates_match_the_probabilities(mode, field, probability):
    assert_rate(share_changed(only(**{field: probability}), colours(mode=mode)), probability)


def test_greyscale_rate():
    torch.manual_seed(0)
    drawn = build(only(grey_probability=0.2))
    views = [drawn(colours()) for _ in range(600)]
    assert_rate(sum((v[0] == v[1]).all().item() and (v[1] == v[2]).all().item() for v in views) / 600, 0.2)


def test_solarise_rate_differs_between_views():
    """Solarisation turns a white image without jitter black: never in view 1, in a fifth of view 2."""
    rates = []
    for view in byol(16):
        torch.manual_seed(0)
        drawn = build(dataclasses.replace(view, jitter_probability=0.0))
        rates.append(sum(drawn(Image.new("RGB", (16, 16), "white")).sum().item() == 0 for _ in range(600)) / 600)
    assert rates[0] == 0
    assert_rate(rates[1], 0.2)


def test_operations_are_independent(monkeypatch):
    """Of five operations with probability 1/2, any two occur together with probability 1/4."""
    happened: set[str] = set()
    for place, name in [
        (F, "horizontal_flip"),
        (F, "adjust_hue"),
        (F, "rgb_to_grayscale"),
        (F, "solarize"),
        (torchvision_backend, "_gaussian_blur"),
    ]:
        monkeypatch.setattr(place, name, lambda image, *a, name=name, **k: happened.add(name) or image)
    half = ("flip", "jitter", "grey", "blur", "solarize")
    view = build(only(**{f"{name}_probability": 0.5 for name in half}))
    torch.manual_seed(0)
    counts: Counter[tuple[str, ...]] = Counter()
    for _ in range(1000):
        happened.clear()
        view(colours())
        counts.update(itertools.combinations(sorted(happened), 2))
    assert len(counts) == 10
    for count in counts.values():
        assert_rate(count / 1000, 1 / 4, 1000)


# crops


def boxes(view: ViewSpec, height: int, width: int, n: int = 3000) -> np.ndarray:
    draws = torch.rand(n, 22, generator=torch.Generator().manual_seed(0)).tolist()
    return np.array([augmentation._crop_box(view, height, width, row) for row in draws])


def test_crops_have_the_areas_and_ratios():
    top, left, height, width = boxes(byol(224)[0], 400, 400).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() == 400
    assert (left + width).max() == 400
    areas, ratios = height * width / 400**2, width / height
    assert areas.min() == pytest.approx(0.08, abs=0.01)
    assert areas.max() > 0.95
    assert ratios.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratios.max() == pytest.approx(4 / 3, abs=0.02)
    small = areas < 0.5  # none of these was sampled again: uniform between 0.08 and 0.5
    assert np.quantile(areas[small], [0.25, 0.5, 0.75]) == pytest.approx([0.185, 0.29, 0.395], abs=0.02)
    assert np.log(ratios[small]).mean() == pytest.approx(0, abs=0.02)


def test_crop_positions_are_uniform():
    top, left, height, width = boxes(byol(224)[0], 400, 300).T
    for offset, slack in ((top, 400 - height), (left, 300 - width)):
        position = (offset / np.maximum(slack, 1))[slack > 50]
        assert np.quantile(position, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)


def test_crop_distribution_equals_torchvisions():
    from torchvision.transforms.v2 import RandomResizedCrop

    view, n = byol(32)[0], 3000
    torch.manual_seed(1)
    theirs = RandomResizedCrop(32, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    image = torch.empty(3, 60, 90)
    crops = [theirs.make_params([image]) for _ in range(n)]
    expected = np.array([[crop[name] for name in ("top", "left", "height", "width")] for crop in crops])
    found = boxes(view, 60, 90, n)
    for column in range(4):
        quantiles = [np.quantile(side[:, column], [0.1, 0.3, 0.5, 0.7, 0.9]) for side in (expected, found)]
        assert np.abs(quantiles[0] - quantiles[1]).max() <= 4


@pytest.mark.parametrize(("height", "width", "box"), [(10, 400, (0, 193, 10, 13)), (400, 12, (192, 0, 16, 12))])
def test_crop_of_a_narrow_image_is_centred(height, width, box):
    view = dataclasses.replace(byol(32)[0], min_scale=1.0)
    assert (boxes(view, height, width, 5) == box).all()


@pytest.mark.parametrize(("source", "size"), [(40, 32), (300, 64), (20, 32), (140, 160)])
def test_resize_matches_pillow_bicubic(source, size):
    """Above 128 x 128 pixels torch resizes, with a difference of at most one grey level."""
    image = colours(source)
    box = (2, 3, source - 4, source - 5)
    expected = image.crop((3, 2, source - 2, source - 2)).resize((size, size), Image.Resampling.BICUBIC)
    found = torchvision_backend._resized_crop(image, box, (size, size))
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= (1 if box[2] * box[3] > 128 * 128 else 0)


# colours


@pytest.mark.parametrize(
    ("field", "value", "adjust", "centre"),
    [
        ("brightness", 0.4, F.adjust_brightness, 1),
        ("contrast", 0.4, F.adjust_contrast, 1),
        ("saturation", 0.2, F.adjust_saturation, 1),
        ("hue", 0.1, F.adjust_hue, 0),
    ],
)
@pytest.mark.parametrize("u", [0.0, 0.25, 1.0])
def test_jitter_factors(field, value, adjust, centre, u):
    strengths = dict.fromkeys(JITTER, 0.0) | {field: value}
    view, image = only(jitter_probability=1.0, **strengths), colours()
    found = torchvision_backend.augment(
        view, sample_view(view, [0.5] * (NUMBERS_PER_VIEW - 4) + [u] * 4, 16, 16), image
    )
    assert torch.equal(found, F.pil_to_tensor(adjust(image, centre - value + 2 * value * u)))


def test_jitter_order_is_random(monkeypatch):
    seen: list[str] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(F, f"adjust_{name}", lambda image, factor, name=name: seen.append(name) or image)
    torch.manual_seed(0)
    drawn = build(only(jitter_probability=1.0))
    for _ in range(480):
        drawn(colours())
    orders = [tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert {len(set(order)) for order in orders} == {4}
    assert len(set(orders)) == 24
    assert_rate(sum(order[0] == "hue" for order in orders) / 480, 1 / 4, 480)


def test_grey_images_skip_colour_operations_with_the_same_parameters():
    """A greyscale image and its RGB copy get the same crop, brightness, contrast and blur from the same numbers."""
    grey = colours(40, "L")
    for view in byol(32):
        drawn = build(dataclasses.replace(view, hue=0.0, saturation=0.0))
        for seed in range(20):
            torch.manual_seed(seed)
            as_grey = drawn(grey)
            after = torch.rand(1)
            torch.manual_seed(seed)
            as_rgb = drawn(grey.convert("RGB"))
            assert torch.equal(after, torch.rand(1))
            assert (as_grey.int() - as_rgb.int()).abs().float().mean() < 2


# parameters


def test_parameters_are_a_function_of_seed_epoch_image_and_size():
    view, first = byol(32)[0], uniform_numbers(1, 2, 3)
    assert uniform_numbers(1, 2, 3) == first and len(first) == 2 and len(first[0]) == NUMBERS_PER_VIEW
    torch.manual_seed(augmentation.mix(1, 2, 3))  # one random stream for both views
    assert first == [torch.rand(NUMBERS_PER_VIEW).tolist(), torch.rand(NUMBERS_PER_VIEW).tolist()]
    others = [uniform_numbers(*key) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert all(other[k] != first[k] for other in others for k in (0, 1)) and first[0] != first[1]
    assert sample_view(view, first[0], 40, 50) == sample_view(view, first[0], 40, 50)


def test_numbers_determine_all_parameters():
    """Parameters of a deterministic view do not depend on the numbers; those of BYOL's view take all their values."""
    rows = torch.rand(200, NUMBERS_PER_VIEW, generator=torch.Generator().manual_seed(0)).tolist()
    expected = ViewParameters(box=(0, 0, 16, 16), flip=False, jitter=(), grey=False, sigma=0.0, solarize=False)
    assert {sample_view(NOTHING, row, 16, 16) for row in rows} == {expected}
    found = [sample_view(byol(112)[1], row, 40, 50) for row in rows]
    for name in ("flip", "grey", "solarize"):
        assert {getattr(one, name) for one in found} == {True, False}
    assert {len(one.jitter) for one in found} == {0, 4}
    assert {bool(one.sigma) for one in found} == {True, False}


@pytest.mark.parametrize("operation", augmentation.OPERATIONS)
def test_only_applies_a_single_operation(operation):
    """All other operations keep the centred square of the image unchanged."""
    view = augmentation.only(byol(128)[1], operation)
    image = colours(128)
    found = [sample_view(view, uniform_numbers(0, 0, i)[0], 128, 128) for i in range(30)]
    assert ({one.box for one in found} == {(0, 0, 128, 128)}) == (operation != "resize")
    names = {name for one in found for name, _ in one.jitter}
    assert names == (set(JITTER) if operation == "order" else {operation} & set(JITTER))
    assert {one.flip for one in found} == {operation == "flip"}
    assert {one.grey for one in found} == {operation == "grey"}
    assert {one.solarize for one in found} == {operation == "solarize"}
    assert {bool(one.sigma) for one in found} == {operation == "blur"}
    changed = [not torch.equal(torchvision_backend.augment(view, one, image), F.pil_to_tensor(image)) for one in found]
    assert sum(changed) >= (20 if operation == "blur" else 30)  # the smallest sigmas change no pixel


# blur


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blur_matches_torchvision(size, share):
    view = byol(size)[0]
    sigma = view.blur_sigma[0] + share * (view.blur_sigma[1] - view.blur_sigma[0])
    pixels = F.pil_to_tensor(colours(size))
    expected = F.gaussian_blur(pixels, [view.blur_kernel] * 2, [sigma] * 2)
    found = torchvision_backend._gaussian_blur(pixels, view.blur_kernel, sigma)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_blur_sigma_is_uniform(monkeypatch):
    sigmas: list[float] = []
    monkeypatch.setattr(
        torchvision_backend, "_gaussian_blur", lambda pixels, kernel, sigma: sigmas.append(sigma) or pixels
    )
    torch.manual_seed(0)
    drawn = build(byol(112)[0])
    for _ in range(500):
        drawn(colours(112))
    assert len(sigmas) == 500
    assert np.quantile(sigmas, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.05, 0.2875, 0.525, 0.7625, 1], abs=0.06)


def test_kernel_below_3_does_not_blur():
    assert share_changed(only(blur_probability=1.0, blur_kernel=1), colours(), n=5) == 0


# evaluation


def test_evaluation_view_crops_an_eighth_of_larger_images():
    image = colours(256)
    expected = image.crop((16, 16, 240, 240))
    assert torch.equal(evaluation_view(224)(image), F.pil_to_tensor(expected))
    wide = Image.new("RGB", (400, 100), "white")
    wide.paste("black", (120, 0, 280, 100))
    assert evaluation_view(48)(wide).max() == 0


def test_evaluation_view_does_not_crop_small_images():
    image = colours(28, "L")
    assert torch.equal(evaluation_view(28)(image), F.pil_to_tensor(image))
    larger = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(evaluation_view(32)(image), F.pil_to_tensor(larger))


def test_evaluation_view_can_be_pickled():
    view = evaluation_view(32)
    assert torch.equal(pickle.loads(pickle.dumps(view))(colours()), view(colours()))
    for spec in byol(32):
        assert pickle.loads(pickle.dumps(spec)) == spec
