"""Loaders: each image once per epoch, and bits that depend on neither workers nor batches nor interruptions."""

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dspnet_fast.errors import InputError
from train.data.bad_images import BadImages
from train.data.loader import evaluation_batches, one_view_batches, readable_views, two_view_batches, worker_count
from train.data.normalization import normalize
from train.data.sampler import EpochSampler, mix
from train.data.views.augmentation import byol, sample_view, supervised, uniform_numbers
from train.data.views.torchvision_backend import augment, evaluation_view

VIEWS = byol(16)


def never(i: int) -> bool:
    return False


def third(i: int) -> bool:
    return i == 2


class Noise:
    """A dataset of noise, different for each image; RGB where `colour` returns True."""

    def __init__(self, n: int = 10, colour=never):
        self.name = "drawn"
        self.labels: torch.Tensor | None = None
        self.classes: list[str] = []
        self._n = n
        self._colour = colour

    def __len__(self) -> int:
        return self._n

    def load(self, i: int) -> Image.Image:
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert("RGB" if self._colour(i) else "L")

    def file(self, i: int) -> str:
        return f"image {i}"


def batches(workers: int = 0, n: int = 10, batch_size: int = 3, seed: int = 5, epochs: int = 3, start_step: int = 0):
    order = EpochSampler(n, batch_size, seed, epochs, start_step)
    return list(two_view_batches(Noise(n), VIEWS, order, workers))


# order


def test_each_epoch_has_each_image_once():
    order = EpochSampler(n=10, batch_size=5, seed=0, epochs=4)
    assert (order.steps_per_epoch, len(order)) == (2, 8)
    items = [item for batch in order for item in batch]
    assert sorted(items) == [(epoch, i) for epoch in range(4) for i in range(10)]
    epochs = [tuple(i for e, i in items if e == epoch) for epoch in range(4)]
    assert len(set(epochs)) == 4


def test_incomplete_batches_are_dropped():
    order = EpochSampler(n=11, batch_size=4, seed=0, epochs=30)
    assert (order.steps_per_epoch, len(order)) == (2, 60)
    for _epoch, group in itertools.groupby((item for batch in order for item in batch), key=lambda item: item[0]):
        assert len({i for _, i in group}) == 8
    assert {i for batch in order for _, i in batch} == set(range(11))  # different ones in each epoch


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 8, 9])
def test_sampler_starts_at_any_step(start):
    whole = list(EpochSampler(n=10, batch_size=3, seed=1, epochs=3))
    rest = EpochSampler(n=10, batch_size=3, seed=1, epochs=3, start_step=start)
    assert len(rest) == 9 - start
    assert list(rest) == whole[start:]
    assert list(rest) == whole[start:]  # iterating again


def test_starting_late_computes_one_permutation(monkeypatch):
    counted = []
    original = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: counted.append(1) or original(*a, **k))
    next(iter(EpochSampler(n=10, batch_size=3, seed=1, epochs=10**6, start_step=3 * 10**6 - 2)))
    assert len(counted) == 1


def test_seeds_give_different_orders():
    first, second = (list(EpochSampler(100, 100, seed, 1)) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(("n", "batch_size"), [(10, 11), (10, 0), (0, 1)])
def test_batch_larger_than_the_dataset_raises_input_error(n, batch_size):
    with pytest.raises(InputError, match=f"batch of {batch_size}.*{n}"):
        EpochSampler(n, batch_size, seed=0, epochs=1)


@pytest.mark.parametrize("start", [0, 4])
def test_ranks_split_the_batches_of_one(start):
    """Two ranks together see each image of an epoch once, also after resuming within the epoch."""
    one = list(EpochSampler(11, 4, seed=1, epochs=3, start_step=start))
    ranks = [list(EpochSampler(11, 4, 1, 3, start, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == one
    assert EpochSampler(11, 4, 1, 3, world_size=2).images_per_step == 2


def test_batch_must_be_a_multiple_of_the_ranks():
    with pytest.raises(InputError, match="4 images for 3 ranks: give a multiple of 3"):
        EpochSampler(10, 4, 0, 1, rank=0, world_size=3)


# bits


@pytest.fixture(scope="module")
def uninterrupted():
    return batches(workers=0)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 4])
def test_workers_and_resume_change_no_bit(uninterrupted, workers, start):
    """Step 4 is in the middle of the second epoch, which has 3."""
    assert_same(batches(workers=workers, start_step=start), uninterrupted[start:])


def test_views_depend_on_seed_epoch_and_image_only():
    """They depend neither on the batch size nor on the other images."""

    def by_image(batch_size):
        found = {}
        for items, batch in zip(EpochSampler(12, batch_size, 5, 2), batches(0, 12, batch_size, epochs=2), strict=True):
            for k, item in enumerate(items):
                found[item] = torch.stack([batch[k], batch[batch_size + k]])
        return found

    small, large = by_image(2), by_image(6)
    assert small.keys() == large.keys()
    assert all(torch.equal(small[item], large[item]) for item in small)


def test_epochs_and_seeds_give_different_views():
    first, second = (
        {item: batch[k] for items, batch in zip(EpochSampler(8, 4, s, 2), batches(0, 8, 4, s, 2), strict=True)
         for k, item in enumerate(items)}
        for s in (1, 2)
    )  # fmt: skip
    for i in range(8):
        assert not torch.equal(first[0, i], first[1, i])
        assert not torch.equal(first[0, i], second[0, i])


def test_mixed_seeds_differ_in_their_lower_32_bits():
    """torch's CPU generator uses only these."""
    seeds = {mix(s, e, i) % 2**32 for s in range(10) for e in range(10) for i in range(10)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generator_is_not_advanced(workers):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = []
    for _ in two_view_batches(Noise(), VIEWS, EpochSampler(10, 3, 0, 1), workers):
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)


# layout


def test_first_views_precede_second_views():
    order = EpochSampler(10, 4, 3, 1)
    items, batch = next(iter(order)), next(iter(two_view_batches(Noise(), VIEWS, order, 0)))
    assert batch.dtype == torch.uint8
    assert batch.shape == (8, 1, 16, 16)
    for k, (epoch, i) in enumerate(items):
        image = Noise().load(i)
        for view, uniform, found in zip(VIEWS, uniform_numbers(3, epoch, i), (batch[k], batch[4 + k]), strict=True):
            assert torch.equal(found, augment(view, sample_view(view, uniform, 20, 20), image))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_view_batches_follow_the_sampler(workers):
    order, view = EpochSampler(10, 4, 3, 1), supervised(16)
    found = list(one_view_batches(Noise(), view, order, workers))
    for items, batch in zip(order, found, strict=True):
        for (epoch, i), pixels in zip(items, batch, strict=True):
            (uniform,) = uniform_numbers(3, epoch, i, views=1)
            assert torch.equal(pixels, augment(view, sample_view(view, uniform, 20, 20), Noise().load(i)))


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_batches_are_rgb(workers):
    mixed, grey = (
        next(iter(two_view_batches(Noise(4, colour), VIEWS, EpochSampler(4, 4, 3, 1), workers)))
        for colour in (third, never)
    )
    assert mixed.shape == (8, 3, 16, 16)
    coloured = [i for _, i in next(iter(EpochSampler(4, 4, 3, 1)))].index(2)
    for k in {0, 1, 2, 3} - {coloured}:
        assert torch.equal(mixed[k], grey[k].expand(3, -1, -1))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_keep_the_order_and_the_last_batch(workers):
    indices = [7, 0, 3, 3, 9]
    found = list(evaluation_batches(Noise(), indices, image_size=16, batch_size=2, workers=workers))
    assert [len(batch) for batch in found] == [2, 2, 1]
    view = evaluation_view(16)
    assert torch.equal(torch.cat(found), torch.stack([view(Noise().load(i)) for i in indices]))


def test_evaluation_accepts_index_tensors_and_rejects_empty_batches():
    (found,) = evaluation_batches(Noise(), torch.tensor([1, 2]), 16, 8, workers=0)
    assert found.shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match="at least 1"):
        evaluation_batches(Noise(), [1], 16, 0)


def test_worker_count_auto_depends_on_images_and_cores(monkeypatch):
    assert worker_count(3, 10) == 3
    assert worker_count("auto", 10) == 0
    for cpus, expected in ((2, 2), (64, 8), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert worker_count("auto", 10_000) == expected
    with pytest.raises(InputError, match="auto"):
        worker_count(-1, 10)


# failure


class Broken(Noise):
    def load(self, i: int) -> Image.Image:
        if i == 6:
            raise InputError("cannot read the image six.png")
        return super().load(i)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_of_workers_keep_their_message(workers):
    for found in (
        two_view_batches(Broken(), VIEWS, EpochSampler(10, 5, 0, 1), workers),
        one_view_batches(Broken(), supervised(16), EpochSampler(10, 5, 0, 1), workers),
        evaluation_batches(Broken(), range(10), 16, 4, workers),
    ):
        with pytest.raises(InputError) as caught:
            list(found)
        assert str(caught.value) == "cannot read the image six.png"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_by_the_next_and_counted(workers):
    """Image 7 occurs twice per epoch, once in place of image 6 with the random numbers of 6."""
    bad, order = BadImages(limit=1), EpochSampler(10, 5, 0, 2)
    found = list(two_view_batches(Broken(), VIEWS, order, workers, bad))
    assert len(bad) == 1
    assert bad.new_messages() == ["left out, bad image 1 of 1 allowed: cannot read the image six.png"]
    assert bad.new_messages() == []
    for items, batch in zip(order, found, strict=True):
        for k, (epoch, i) in enumerate(items):
            view = VIEWS[0]
            expected = augment(
                view, sample_view(view, uniform_numbers(0, epoch, i)[0], 20, 20), Noise().load(7 if i == 6 else i)
            )
            assert torch.equal(batch[k], expected)


class Worse(Noise):
    def load(self, i: int) -> Image.Image:
        if i in (5, 6, 7):
            raise InputError(f"cannot read the image {i}")
        return super().load(i)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_one_unreadable_image_above_the_limit_raises(workers, limit):
    bad = BadImages(limit)
    loaded = two_view_batches(Worse(), VIEWS, EpochSampler(10, 5, 0, 1), workers, bad)
    if limit == 3:
        assert len(list(loaded)) == 2 and len(bad.new_messages()) == 3
        return
    with pytest.raises(InputError, match=rf"cannot read the image \d; that is more than --max-bad-images {limit}"):
        list(loaded)
    assert len(bad.new_messages()) == limit


def test_a_dataset_without_readable_images_raises():
    class Hopeless(Noise):
        def load(self, i: int) -> Image.Image:
            raise InputError(f"cannot read the image {i}")

    with pytest.raises(InputError, match="cannot read the image"):
        list(two_view_batches(Hopeless(), VIEWS, EpochSampler(10, 5, 0, 1), 0, BadImages(limit=100)))
    with pytest.raises(InputError, match="none of the .* can be read"):
        readable_views(Hopeless(), 16, BadImages(limit=100))


def test_readable_views_skip_unreadable_images():
    bad = BadImages(limit=3)
    pixels, kept = readable_views(Worse(), 16, bad)
    assert kept == [0, 1, 2, 3, 4, 8, 9]
    assert len(bad) == 3
    assert torch.equal(pixels[5], evaluation_view(16)(Noise().load(8)))
    with pytest.raises(InputError, match="image 7"):
        readable_views(Worse(), 16, BadImages(limit=2))


class Reporting(Noise):
    """Records the process id of each worker."""

    def __init__(self, folder: Path):
        super().__init__(8)
        self._folder = folder

    def load(self, i: int) -> Image.Image:
        (self._folder / f"{os.getpid()}-{torch.get_num_threads()}").touch()
        return super().load(i)


def test_workers_live_for_all_epochs_with_one_thread_and_ignore_interrupts(tmp_path):
    batches = iter(two_view_batches(Reporting(tmp_path), VIEWS, EpochSampler(8, 2, 0, epochs=3), workers=2))
    next(batches)
    processes = {int(path.name.split("-")[0]) for path in tmp_path.iterdir()}
    assert os.getpid() not in processes
    for process in processes:
        os.kill(process, signal.SIGINT)
    assert len(list(batches)) == 11
    reports = [path.name.split("-") for path in tmp_path.iterdir()]
    assert len(reports) == 2
    assert {threads for _, threads in reports} == {"1"}
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_workers_end_with_an_abandoned_iteration():
    before = set(multiprocessing.active_children())
    batches = iter(two_view_batches(Noise(), VIEWS, EpochSampler(10, 5, 0, 9), workers=2))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del batches
    assert set(multiprocessing.active_children()) == before


def test_workers_end_with_an_error_that_is_still_referenced():
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError) as held:
        list(two_view_batches(Broken(), VIEWS, EpochSampler(10, 5, 0, 9), workers=2))
    assert set(multiprocessing.active_children()) == before
    assert held.tb is not None


# normalisation


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_matches_float64(channels):
    batch = torch.randint(0, 256, (4, channels, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalize(batch)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    expected = (batch.expand(-1, 3, -1, -1).double() / 255 - mean) / std
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, 5, 6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.double() - expected).abs().max() <= torch.finfo(torch.float32).eps * 8  # values up to 4


def test_normalize_rejects_other_dtypes_than_uint8():
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.rand(1, 3, 2, 2))
