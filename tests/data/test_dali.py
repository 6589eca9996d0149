"""dali-cpu against torchvision: equal views from equal parameters, within the bounds of docs/data.md."""

import gc
import io

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.bad_images import BadImages
from train.data.datasets import open_images
from train.data.datasets.images import Subset
from train.data.loader import two_view_batches
from train.data.sampler import EpochSampler
from train.data.views.augmentation import OPERATIONS, byol, only, uniform_numbers

pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install 'dspnet-fast[dali]')")

from train.data.views import dali_backend  # noqa: E402

SIZE = 48
# grey levels: mean absolute difference, its 99th percentile, absolute difference of the means; see docs/data.md
BOUNDS = {
    "resize": (0.5, 2, 0.2),
    "flip": (0.5, 2, 0.2),
    "brightness": (1.0, 2, 0.8),
    "contrast": (1.2, 3, 0.8),
    "saturation": (1.2, 3, 0.8),
    "hue": (1.5, 6, 0.5),
    "order": (2.5, 8, 2.0),
    "grey": (1.0, 2, 0.5),
    "blur": (0.5, 2, 0.3),
    "solarize": (0.6, 3, 0.3),
}


def photograph(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Smooth colours with edges and slight noise, as in a photograph."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(int)
    pixels[20:50, 30:70] = 255 - pixels[20:50, 30:70]
    return Image.fromarray((pixels + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for k in range(26):
        photograph(k, (120 + k, 90 + 3 * k)).save(folder / f"{k:02}.jpg", quality=92)
    return open_images(str(folder), "train")


def made(images, views, order, threads=2, bad=None, photometric=None):
    return list(
        dali_backend.DaliLoader(
            images, views, order, threads, BadImages() if bad is None else bad, photometric=photometric
        )
    )


# photometric operations: by torch as on a CPU, or by DALI as on a GPU
makers = pytest.mark.parametrize("by_dali", [False, True], ids=["torch", "dali"])


def apart(images, views, by_dali=False) -> torch.Tensor:
    order = EpochSampler(len(images), len(images), 0, 1)
    (found,) = made(images, views, order, photometric=by_dali)
    (expected,) = two_view_batches(images, views, order, 0)
    return found.float() - expected.float()


@makers
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_matches_torchvision(images, operation, by_dali):
    mean, quantile, shift = BOUNDS[operation]
    found = apart(images, tuple(only(view, operation) for view in byol(SIZE)), by_dali)
    assert found.abs().mean() <= mean
    assert np.quantile(found.abs().numpy(), 0.99) <= quantile
    assert found.mean().abs() <= shift


@makers
def test_all_operations_together_match_torchvision(images, by_dali):
    found = apart(images, byol(SIZE), by_dali)
    assert found.abs().mean() <= 2.5
    assert np.quantile(found.abs().numpy(), 0.98) <= 12  # pixels at the threshold of solarisation may differ


def test_each_operation_changes_the_image(images):
    """Otherwise the bounds above would hold without the operation."""
    order = EpochSampler(8, 8, 0, 1)
    images = Subset(images, range(8))
    views = byol(224)  # at SIZE there is little blur
    (still,) = made(images, tuple(only(view, "nothing") for view in views), order)
    for operation in OPERATIONS:
        (found,) = made(images, tuple(only(view, operation) for view in views), order)
        changed = (found.float() - still.float()).abs().mean()
        assert changed > (1 if operation == "blur" else 2) * BOUNDS[operation][0], operation


@pytest.mark.parametrize("size", [(48, 48), (30, 31), (400, 300)])
def test_resize_up_and_down(tmp_path, size):
    photograph(0, size).save(tmp_path / "0.png")
    found = apart(open_images(str(tmp_path), "train"), tuple(only(view, "resize") for view in byol(SIZE)))
    assert found.abs().mean() <= 0.5
    inner = found[..., 3:-3, 3:-3]  # at the border DALI's filter uses pixels outside of the crop, Pillow's does not
    assert inner.abs().max() <= 6 and np.quantile(inner.abs().numpy(), 0.99) <= 2


@makers
def test_hue_rotation_of_pure_colours_matches_hsv(by_dali):
    """All corners of the RGB cube and their mixtures, against HSV in floating point."""
    import colorsys

    random = np.random.default_rng(0)
    levels = np.array([0, 1, 128, 254, 255])
    pixels = np.concatenate(
        [np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3), random.integers(0, 256, (1811, 3))]
    ).astype(np.uint8)

    class One:
        name, labels, classes = "one", None, []

        def __len__(self):
            return 1

        def encoded(self, i):
            out = io.BytesIO()
            Image.fromarray(pixels.reshape(44, 44, 3)).save(out, "png")
            return out.getvalue()

        def file(self, i):
            return "one"

    views = tuple(only(view, "hue") for view in byol(44))
    for seed in range(4):
        (batch,) = made(One(), views, EpochSampler(1, 1, seed, 1), photometric=by_dali)
        for k, view in enumerate(views):
            turn = dict(dali_backend.sample_view(view, uniform_numbers(seed, 0, 0)[k], 44, 44).jitter)["hue"]
            expected = []
            for red, green, blue in pixels / 255:
                h, s, v = colorsys.rgb_to_hsv(red, green, blue)
                expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
            found = batch[k].permute(1, 2, 0).reshape(-1, 3).numpy()
            assert np.abs(found - 255 * np.array(expected)).max() <= 0.51


# bits


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_threads_and_resume_change_no_bit(images, threads, start):
    whole = made(images, byol(SIZE), EpochSampler(26, 6, 3, 2))
    assert_same(made(images, byol(SIZE), EpochSampler(26, 6, 3, 2, start), threads), whole[start:])


def test_two_ranks_split_the_batches_of_one(images):
    whole = made(images, byol(SIZE), EpochSampler(26, 6, 3, 1))
    ranks = [made(images, byol(SIZE), EpochSampler(26, 6, 3, 1, 0, rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        halves = [torch.cat(parts) for parts in zip(first.chunk(2), second.chunk(2))]
        assert torch.equal(batch, torch.cat(halves))


def test_first_views_precede_second_views(images):
    batch = made(images, byol(SIZE), EpochSampler(26, 6, 3, 1))[0]
    assert batch.dtype == torch.uint8 and batch.shape == (12, 3, SIZE, SIZE)
    assert batch.is_contiguous()


def test_batches_are_not_overwritten_by_later_ones(images):
    batches = dali_backend.DaliLoader(images, byol(SIZE), EpochSampler(26, 6, 3, 2), 1, BadImages())
    iterator = iter(batches)
    first = next(iterator)
    copy = first.clone()
    list(iterator)
    assert torch.equal(first, copy)


def test_loader_can_be_iterated_again_and_abandoned(images):
    batches = dali_backend.DaliLoader(images, byol(SIZE), EpochSampler(26, 6, 3, 1), 1, BadImages())
    whole = list(batches)
    assert_same([next(iter(batches))], whole[:1])
    assert_same(list(batches), whole)
    assert_same(list(batches), whole)
    assert len(batches) == 4


class Collecting(Subset):
    """Collects garbage before loading an image, as Python may at any time."""

    def load(self, i):
        gc.collect()
        return super().load(i)


def test_torchvision_workers_start_while_dali_is_loaded(images):
    """A forked worker would garbage-collect the pipeline and wait forever for threads that it does not have."""
    views, order = byol(SIZE), EpochSampler(4, 2, 3, 1)
    few = Collecting(images, range(4))
    expected = list(two_view_batches(few, views, order, workers=0))
    gc.disable()
    try:
        batches = dali_backend.DaliLoader(images, views, EpochSampler(26, 26, 0, 1), 1, BadImages())
        list(batches)
        batches.itself = batches
        del batches
        loader = two_view_batches(few, views, order, workers=1)
        loader.timeout = 60  # seconds; the default is to wait forever
        assert_same(list(loader), expected)
    finally:
        gc.enable()


def test_program_can_end_during_an_iteration(images, run_python):
    """The pipeline's thread ends before DALI is shut down; otherwise the program aborts at times."""
    code = f"""
import atexit, threading
from train.data.views.augmentation import byol
from train.data.bad_images import BadImages
from train.data.views.dali_backend import DaliLoader
from train.data.sampler import EpochSampler
from train.data.datasets import open_images
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
images = open_images({images.name!r}, "train")
batches = iter(DaliLoader(images, byol(16), EpochSampler(26, 4, 0, 500), 2, BadImages()))
print(len(next(batches)))
"""
    assert run_python("-c", code) == "8\n['MainThread']\n"


# files that DALI cannot decode


def test_images_that_dali_cannot_decode_are_decoded_by_pillow(images, monkeypatch):
    """The bits are those of decoding with Pillow from the start, and the rest of the batch is unchanged."""
    gif = io.BytesIO()
    photograph(7).save(gif, "gif")

    class Odd(Subset):
        def encoded(self, i):
            return gif.getvalue() if i == 7 else super().encoded(i)

    odd, order = Odd(images, range(26)), EpochSampler(26, 6, 3, 2)
    expected = made(odd, byol(SIZE), order)
    monkeypatch.setattr(dali_backend, "plain_jpeg", lambda content: Image.open(io.BytesIO(content)).size[::-1])
    undecodable = []
    find = dali_backend.DaliLoader._undecodable
    monkeypatch.setattr(
        dali_backend.DaliLoader,
        "_undecodable",
        lambda self, samples: undecodable.append(find(self, samples)) or undecodable[-1],
    )
    assert_same(made(odd, byol(SIZE), order), expected)
    assert undecodable == [[k] for items in order for k, (_, i) in enumerate(items) if i == 7] != []


@pytest.mark.parametrize("threads", [1, 2])
def test_views_do_not_depend_on_damaged_images_in_the_batch(tmp_path, threads):
    """The used, skipped and replacement images are the same in every batch.

    Pillow detects some damage that DALI ignores, so an image must not be decoded by Pillow because of its neighbour.
    """
    for k in range(24):
        out = io.BytesIO()
        photograph(k, (60, 50)).save(out, "jpeg", quality=90)
        content = bytearray(out.getvalue())
        if k in (1, 10, 21, 23):
            random = np.random.default_rng(k)
            place = random.integers(2, len(content) - 60)
            content[place : place + 50] = random.bytes(50)
        (tmp_path / f"{k:02}.jpg").write_bytes(content)
    images = open_images(str(tmp_path), "train")
    views, counts = [], []
    for size in (1, 6, 24):
        bad, order = BadImages(24), EpochSampler(24, size, 0, 1)
        batches = made(images, byol(16), order, threads, bad)
        views.append(
            {i: batch[[k, size + k]] for items, batch in zip(order, batches) for k, (_, i) in enumerate(items)}
        )
        counts.append(sorted(bad.found))
    assert counts[0] == counts[1] == counts[2] and 0 < len(counts[0]) <= 4
    for i in range(24):
        assert torch.equal(views[0][i], views[1][i]) and torch.equal(views[0][i], views[2][i]), i


def test_other_errors_are_raised_by_the_iteration(images):
    class Broken(Subset):
        def encoded(self, i):
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        made(Broken(images, range(26)), byol(SIZE), EpochSampler(26, 6, 3, 1))
