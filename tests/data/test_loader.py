"""Batches: every image once an epoch, and the same bits whatever the workers, the batch or an interruption."""

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
from train.data.views.augmentation import byol, draw, numbers, supervised
from train.data.views.torchvision_backend import augment, evaluation_view

VIEWS = byol(16)


def never(i: int) -> bool:
    return False


def third(i: int) -> bool:
    return i == 2


class Drawn:
    """Images of noise, each another; RGB where `colour` says so."""

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
    return list(two_view_batches(Drawn(n), VIEWS, order, workers))


# order


def test_each_epoch_sees_each_image_once():
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
    assert {i for batch in order for _, i in batch} == set(range(11))  # not the same ones each time


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 8, 9])
def test_order_from_any_step(start):
    whole = list(EpochSampler(n=10, batch_size=3, seed=1, epochs=3))
    rest = EpochSampler(n=10, batch_size=3, seed=1, epochs=3, start_step=start)
    assert len(rest) == 9 - start
    assert list(rest) == whole[start:]
    assert list(rest) == whole[start:]  # and again


def test_starting_late_costs_one_permutation(monkeypatch):
    counted = []
    original = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: counted.append(1) or original(*a, **k))
    next(iter(EpochSampler(n=10, batch_size=3, seed=1, epochs=10**6, start_step=3 * 10**6 - 2)))
    assert len(counted) == 1


def test_seeds_give_other_orders():
    first, second = (list(EpochSampler(100, 100, seed, 1)) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(("n", "batch_size"), [(10, 11), (10, 0), (0, 1)])
def test_batch_must_fit_the_set(n, batch_size):
    with pytest.raises(InputError, match=f"batch of {batch_size}.*{n}"):
        EpochSampler(n, batch_size, seed=0, epochs=1)


@pytest.mark.parametrize("start", [0, 4])
def test_ranks_share_the_batches_of_one(start):
    """Two ranks see together what one would: each image of an epoch exactly once, also after a resume inside it."""
    one = list(EpochSampler(11, 4, seed=1, epochs=3, start_step=start))
    ranks = [list(EpochSampler(11, 4, 1, 3, start, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == one
    assert EpochSampler(11, 4, 1, 3, world_size=2).images_per_step == 2


def test_ranks_must_divide_the_batch():
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


def test_views_depend_on_seed_epoch_and_image_alone():
    """Neither on the batch size nor on the other images."""

    def by_image(batch_size):
        found = {}
        for items, batch in zip(EpochSampler(12, batch_size, 5, 2), batches(0, 12, batch_size, epochs=2), strict=True):
            for k, item in enumerate(items):
                found[item] = torch.stack([batch[k], batch[batch_size + k]])
        return found

    small, large = by_image(2), by_image(6)
    assert small.keys() == large.keys()
    assert all(torch.equal(small[item], large[item]) for item in small)


def test_epochs_and_seeds_draw_other_views():
    first, second = (
        {item: batch[k] for items, batch in zip(EpochSampler(8, 4, s, 2), batches(0, 8, 4, s, 2), strict=True)
         for k, item in enumerate(items)}
        for s in (1, 2)
    )  # fmt: skip
    for i in range(8):
        assert not torch.equal(first[0, i], first[1, i])
        assert not torch.equal(first[0, i], second[0, i])


def test_seeds_of_neighbours_differ_in_their_lower_32_bits():
    """All that torch's CPU generator uses of a seed."""
    seeds = {mix(s, e, i) % 2**32 for s in range(10) for e in range(10) for i in range(10)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generator_is_left_alone(workers):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = []
    for _ in two_view_batches(Drawn(), VIEWS, EpochSampler(10, 3, 0, 1), workers):
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)


# layout


def test_first_views_then_second_views():
    order = EpochSampler(10, 4, 3, 1)
    items, batch = next(iter(order)), next(iter(two_view_batches(Drawn(), VIEWS, order, 0)))
    assert batch.dtype == torch.uint8
    assert batch.shape == (8, 1, 16, 16)
    for k, (epoch, i) in enumerate(items):
        image = Drawn().load(i)
        for view, uniform, found in zip(VIEWS, numbers(3, epoch, i), (batch[k], batch[4 + k]), strict=True):
            assert torch.equal(found, augment(view, draw(view, uniform, 20, 20), image))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_view_of_each_image_in_the_orders_order(workers):
    order, view = EpochSampler(10, 4, 3, 1), supervised(16)
    found = list(one_view_batches(Drawn(), view, order, workers))
    for items, batch in zip(order, found, strict=True):
        for (epoch, i), pixels in zip(items, batch, strict=True):
            (uniform,) = numbers(3, epoch, i, views=1)
            assert torch.equal(pixels, augment(view, draw(view, uniform, 20, 20), Drawn().load(i)))


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_batches_are_rgb(workers):
    mixed, grey = (
        next(iter(two_view_batches(Drawn(4, colour), VIEWS, EpochSampler(4, 4, 3, 1), workers)))
        for colour in (third, never)
    )
    assert mixed.shape == (8, 3, 16, 16)
    coloured = [i for _, i in next(iter(EpochSampler(4, 4, 3, 1)))].index(2)
    for k in {0, 1, 2, 3} - {coloured}:
        assert torch.equal(mixed[k], grey[k].expand(3, -1, -1))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_keep_the_order_and_the_rest(workers):
    indices = [7, 0, 3, 3, 9]
    found = list(evaluation_batches(Drawn(), indices, image_size=16, batch_size=2, workers=workers))
    assert [len(batch) for batch in found] == [2, 2, 1]
    view = evaluation_view(16)
    assert torch.equal(torch.cat(found), torch.stack([view(Drawn().load(i)) for i in indices]))


def test_evaluation_takes_tensors_of_indices_and_refuses_empty_batches():
    (found,) = evaluation_batches(Drawn(), torch.tensor([1, 2]), 16, 8, workers=0)
    assert found.shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match="at least 1"):
        evaluation_batches(Drawn(), [1], 16, 0)


def test_worker_count(monkeypatch):
    assert worker_count(3, 10) == 3
    assert worker_count("auto", 10) == 0
    for cpus, expected in ((2, 2), (64, 8), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert worker_count("auto", 10_000) == expected
    with pytest.raises(InputError, match="auto"):
        worker_count(-1, 10)


# failure


class Broken(Drawn):
    def load(self, i: int) -> Image.Image:
        if i == 6:
            raise InputError("cannot read the image six.png")
        return super().load(i)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_unreadable_images_raise_their_own_message(workers):
    for found in (
        two_view_batches(Broken(), VIEWS, EpochSampler(10, 5, 0, 1), workers),
        one_view_batches(Broken(), supervised(16), EpochSampler(10, 5, 0, 1), workers),
        evaluation_batches(Broken(), range(10), 16, 4, workers),
    ):
        with pytest.raises(InputError) as caught:
            list(found)
        assert str(caught.value) == "cannot read the image six.png"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_by_the_next_and_counted(workers):
    """Image 7 comes twice an epoch, once as itself and once in place of 6 with the numbers of 6."""
    bad, order = BadImages(limit=1), EpochSampler(10, 5, 0, 2)
    found = list(two_view_batches(Broken(), VIEWS, order, workers, bad))
    assert len(bad) == 1
    assert bad.news() == ["left out, bad image 1 of 1 allowed: cannot read the image six.png"]
    assert bad.news() == []
    for items, batch in zip(order, found, strict=True):
        for k, (epoch, i) in enumerate(items):
            view = VIEWS[0]
            expected = augment(view, draw(view, numbers(0, epoch, i)[0], 20, 20), Drawn().load(7 if i == 6 else i))
            assert torch.equal(batch[k], expected)


class Worse(Drawn):
    def load(self, i: int) -> Image.Image:
        if i in (5, 6, 7):
            raise InputError(f"cannot read the image {i}")
        return super().load(i)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_one_bad_image_too_many_is_an_error(workers, limit):
    bad = BadImages(limit)
    loaded = two_view_batches(Worse(), VIEWS, EpochSampler(10, 5, 0, 1), workers, bad)
    if limit == 3:
        assert len(list(loaded)) == 2 and len(bad.news()) == 3
        return
    with pytest.raises(InputError, match=rf"cannot read the image \d; more bad ones than --max-bad-images {limit}"):
        list(loaded)
    assert len(bad.news()) == limit


def test_a_set_of_bad_images_ends(tmp_path):
    class Hopeless(Drawn):
        def load(self, i: int) -> Image.Image:
            raise InputError(f"cannot read the image {i}")

    with pytest.raises(InputError, match="cannot read the image"):
        list(two_view_batches(Hopeless(), VIEWS, EpochSampler(10, 5, 0, 1), 0, BadImages(limit=100)))
    with pytest.raises(InputError, match="none can be read"):
        readable_views(Hopeless(), 16, BadImages(limit=100))


def test_readable_views_leave_out_the_others():
    bad = BadImages(limit=3)
    pixels, kept = readable_views(Worse(), 16, bad)
    assert kept == [0, 1, 2, 3, 4, 8, 9]
    assert len(bad) == 3
    assert torch.equal(pixels[5], evaluation_view(16)(Drawn().load(8)))
    with pytest.raises(InputError, match="image 7"):
        readable_views(Worse(), 16, BadImages(limit=2))


class Reporting(Drawn):
    """Leaves the process id of whoever loads."""

    def __init__(self, folder: Path):
        super().__init__(8)
        self._folder = folder

    def load(self, i: int) -> Image.Image:
        (self._folder / f"{os.getpid()}-{torch.get_num_threads()}").touch()
        return super().load(i)


def test_workers_last_all_epochs_with_one_thread_and_ignore_interrupts(tmp_path):
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
    batches = iter(two_view_batches(Drawn(), VIEWS, EpochSampler(10, 5, 0, 9), workers=2))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del batches
    assert set(multiprocessing.active_children()) == before


def test_workers_end_with_an_error_that_is_still_held():
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError) as held:
        list(two_view_batches(Broken(), VIEWS, EpochSampler(10, 5, 0, 9), workers=2))
    assert set(multiprocessing.active_children()) == before
    assert held.tb is not None


# normalisation


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize(channels):
    batch = torch.randint(0, 256, (4, channels, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalize(batch)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[..., None, None]
    expected = (batch.expand(-1, 3, -1, -1).double() / 255 - mean) / std
    assert found.dtype == torch.float32
    assert found.shape == (4, 3, 5, 6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.double() - expected).abs().max() <= torch.finfo(torch.float32).eps * 8  # of numbers up to 4


def test_normalize_refuses_what_are_not_bytes():
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.rand(1, 3, 2, 2))
