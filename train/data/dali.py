"""DALI's way of carrying out Draws: whole batches, on the CPU or on a GPU.

DALI draws nothing and reads no files. Files are read and Draws are made here, in the order that is asked for; what the
pipeline gets is a batch of JPEGs and the numbers of their views. So a run is resumed without any state of DALI's, and
an image's views are the ones that every other backend makes, but for the arithmetic: docs/data.md says how far apart.

Each JPEG is decoded once, and only the region that its two crops lie in. What is no ordinary JPEG is decoded by Pillow
while it is read, as in the other backends, and reaches the pipeline as a PPM file.
"""

from __future__ import annotations

import io
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from dspnet_fast.errors import InputError

from .augment import JITTER, Draw, ViewSpec, draw, numbers
from .bad import BadImages, Refusal, load_or_next
from .colours import LUMA, finish, hue_offset
from .images import ImageSet, as_pnm, decode
from .normalization import MEAN, STD
from .order import EpochOrder

READY = 2  # batches that wait to be used, beside the one in the making
ORIENTATION = 0x0112  # EXIF's number for which way up the camera was held
END_OF_JPEG = b"\xff\xd9"
STAGES = len(JITTER) - 1  # of jitter but hue, that may come before and after it
BRIGHTNESS, CONTRAST, SATURATION, NOTHING = 0, 1, 2, 3


# the pipeline


def _given(name: str, ndim: int = 0, dtype: Any = types.FLOAT) -> Any:
    """What Python feeds under this name, a sample of `ndim` dimensions for each image."""
    return fn.external_source(name=name, ndim=ndim, dtype=dtype)


def _region(gpu: bool) -> Any:
    """The part of each image that its crops lie in, uint8 [H, W, 3]."""
    return fn.decoders.image_slice(
        _given("encoded", 1, types.UINT8),
        start=_given("region_start", 1, types.INT32),
        shape=_given("region_shape", 1, types.INT32),
        axis_names="HW",
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
    )


@pipeline_def
def _decoding(gpu: bool) -> Any:
    return _region(gpu)


@pipeline_def(enable_conditionals=True)
def _views(views: tuple[ViewSpec, ...], gpu: bool, colours: bool) -> Any:
    """Each view of the batch: its crop in uint8 [S, S, 3], or with `colours` all of it, in float32.

    That is [3, S, S] from 0 to 255, on a GPU [S, S, 3] and normalised.
    """
    image = _region(gpu)
    results = []
    for k, view in enumerate(views):
        result = _resized(image, k, view)
        if colours:
            result = _finished(result, k, view, "gpu" if gpu else "cpu")
        if gpu:
            result = fn.crop_mirror_normalize(
                result,
                dtype=types.FLOAT,
                output_layout="HWC",
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
            )
        results.append(result)
    return tuple(results)


def _resized(image: Any, k: int, view: ViewSpec) -> Any:
    return fn.resize(
        image,
        size=[view.image_size, view.image_size],
        roi_start=_given(f"from{k}", 1),  # from right to left is a flip
        roi_end=_given(f"to{k}", 1),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


# Between operations pixels are float32 planes: on a CPU, DALI's way back to bytes costs more than the operations, and
# arithmetic on one channel in three is cheap where channels lie apart.


def _finished(pixels: Any, k: int, view: ViewSpec, device: str) -> Any:
    pixels = fn.transpose(fn.cast(pixels, dtype=types.FLOAT), perm=[2, 0, 1])
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}before{stage}", device)
    if _given(f"hued{k}", dtype=types.BOOL):
        pixels = _turn_hue(pixels, k, device)
    for stage in range(STAGES):
        pixels = _adjust(pixels, f"{k}after{stage}", device)
    if _given(f"grey{k}", dtype=types.BOOL):
        pixels = fn.cat(*[_luma(pixels)] * 3, axis=0)
    if view.blur_kernel >= 3:  # noqa: SIM102  (Python's question about the view, DALI's about each sample)
        if _given(f"blurred{k}", dtype=types.BOOL):
            pixels = fn.gaussian_blur(pixels, sigma=_given(f"sigma{k}"), window_size=view.blur_kernel)
    if _given(f"solarize{k}", dtype=types.BOOL):
        bright = pixels >= view.solarize_threshold - 0.5  # as if it were rounded
        pixels = pixels + bright * (255.0 - 2.0 * pixels)
    return pixels


def _clamped(pixels: Any) -> Any:
    return math.min(math.max(pixels, 0.0), 255.0)  # in less time than clamp


def _plane(pixels: Any, channel: int) -> Any:
    return fn.slice(pixels, channel, 1, axes=[0])


def _luma(pixels: Any) -> Any:
    """[1, S, S]"""
    red, green, blue = LUMA
    return _plane(pixels, 0) * red + _plane(pixels, 1) * green + _plane(pixels, 2) * blue


def _adjust(pixels: Any, name: str, device: str) -> Any:
    """Brightness, contrast, saturation or nothing, as each sample wants."""
    kind = _given(f"kind{name}", dtype=types.INT32)
    factor = _number(f"factor{name}", device)
    if kind == BRIGHTNESS:
        result = math.min(pixels * factor, 255.0)
    elif kind == CONTRAST:
        mean = fn.reductions.mean(_luma(pixels))
        result = _clamped(pixels * factor + mean * (1.0 - factor))
    elif kind == SATURATION:
        result = _clamped(pixels * factor + _luma(pixels) * (1.0 - factor))
    else:
        result = pixels
    return result


def _number(name: str, device: str) -> Any:
    """A number for each image, where arithmetic needs it."""
    return _given(name).gpu() if device == "gpu" else _given(name)


def _turn_hue(pixels: Any, k: int, device: str) -> Any:
    """As `colours.turn_hue`, whose formula this is."""
    red, green, blue = (_plane(pixels, channel) for channel in range(3))
    value = math.max(math.max(red, green), blue)
    least = math.min(math.min(red, green), blue)
    chroma = value - least
    twice = chroma * 2.0
    first, second = green - blue, blue - red
    last = twice * 2.0 - first - second
    hue = last + (value == green) * (twice + second - last)
    hue = hue + (value == red) * (first - hue)
    base, thrice = least - chroma, twice + chroma
    planes = []
    for channel in range(3):
        offset = math.abs(math.abs(hue + chroma * _number(f"turn{k}{channel}", device)) - thrice)
        planes.append(math.min(math.max(base + offset, least), value))
    return fn.cat(*planes, axis=0)


# what it is fed


@dataclass(frozen=True)
class Sample:
    """An image's file, and its views.

    Attributes:
        encoded: uint8 [n], a JPEG or PPM file.
        region: of the image that the views' boxes lie in: top, left, height, width.
        draws: one for each view.
    """

    encoded: np.ndarray
    region: tuple[int, int, int, int]
    draws: list[Draw]


def plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that DALI decodes as Pillow does; None for everything else.

    That is a whole file of greyscale or YCbCr, the right way up.
    """
    try:
        with Image.open(io.BytesIO(content)) as header:
            plain = header.format == "JPEG" and header.mode in ("L", "RGB")
            if plain and "exif" in header.info:
                plain = header.getexif().get(ORIENTATION, 1) == 1
            size = header.height, header.width
    except Exception:  # Pillow will say what is wrong with it when it decodes it
        return None
    return size if plain and content.rstrip(b"\0").endswith(END_OF_JPEG) else None


def _union(boxes: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    top, left = (min(box[axis] for box in boxes) for axis in (0, 1))
    bottom, right = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return top, left, bottom - top, right - left


def _encoded(samples: Sequence[Sample]) -> dict[str, Any]:
    """What `_region` is given, by name."""
    regions = np.array([sample.region for sample in samples], np.int32)
    return {
        "encoded": [sample.encoded for sample in samples],
        "region_start": np.ascontiguousarray(regions[:, :2]),
        "region_shape": np.ascontiguousarray(regions[:, 2:]),
    }


def _inputs(samples: Sequence[Sample], views: Sequence[ViewSpec], colours: bool) -> dict[str, Any]:
    """What `_views` is given, by name."""
    inputs = _encoded(samples)
    for k, view in enumerate(views):
        drawn = [sample.draws[k] for sample in samples]
        boxes = np.array([one.box for one in drawn], np.int32)
        flip = np.array([one.flip for one in drawn])
        top, left = (boxes[:, :2] - inputs["region_start"]).T
        bottom, right = top + boxes[:, 2], left + boxes[:, 3]
        inputs[f"from{k}"] = np.stack([top, np.where(flip, right, left)], 1).astype(np.float32)
        inputs[f"to{k}"] = np.stack([bottom, np.where(flip, left, right)], 1).astype(np.float32)
        if not colours:
            continue
        stages = [_stages(one.jitter) for one in drawn]
        for where, side in enumerate(("before", "after")):
            for stage in range(STAGES):
                chosen = [of_sample[where][stage] for of_sample in stages]
                inputs[f"kind{k}{side}{stage}"] = np.array([kind for kind, _ in chosen], np.int32)
                inputs[f"factor{k}{side}{stage}"] = np.array([factor for _, factor in chosen], np.float32)
        turn = np.array([dict(one.jitter).get("hue", 0.0) for one in drawn])
        inputs[f"hued{k}"] = turn != 0
        for channel in range(3):
            inputs[f"turn{k}{channel}"] = np.array([hue_offset(value, channel) for value in turn], np.float32)
        inputs[f"grey{k}"] = np.array([one.grey for one in drawn])
        if view.blur_kernel >= 3:
            inputs[f"blurred{k}"] = np.array([one.sigma > 0 for one in drawn])
            inputs[f"sigma{k}"] = np.array([one.sigma or 1.0 for one in drawn], np.float32)
        inputs[f"solarize{k}"] = np.array([one.solarize for one in drawn])
    return inputs


Stage = tuple[int, float]


def _stages(jitter: Sequence[tuple[str, float]]) -> tuple[list[Stage], list[Stage]]:
    """(kind, factor) of the STAGES before hue and of those after it."""
    names = [name for name, _ in jitter]
    middle = names.index("hue") if "hue" in names else len(names)
    before, after = (
        [(JITTER.index(name), factor) for name, factor in part] for part in (jitter[:middle], jitter[middle + 1 :])
    )
    rest = [(NOTHING, 1.0)] * STAGES
    return (before + rest)[:STAGES], (after + rest)[:STAGES]


# the batches


class TwoViews:
    """Batches of all of `order`, made by a thread and DALI's own threads while the last ones are used.

    uint8 [2B, 3, S, S] on the CPU, or on the GPU `device` float32, normalised and in channels-last memory; the first
    view of all B images before the second of all. An image that cannot be read is replaced and counted in `bad`; one
    too many raises InputError. DALI decodes, crops and resizes. On a GPU it makes the `colours` as well; on the CPU
    `colours.finish` does in Python's threads, which is faster.
    """

    def __init__(
        self,
        images: ImageSet,
        views: tuple[ViewSpec, ...],
        order: EpochOrder,
        threads: int,
        bad: BadImages,
        device: torch.device | None = None,
        colours: bool | None = None,
    ) -> None:
        self._images, self._views, self._order, self._threads, self._bad = images, views, order, threads, bad
        self._device = device
        self._colours = device is not None if colours is None else colours
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[torch.Tensor]:
        ready: queue.Queue[Any] = queue.Queue(READY)
        stop = threading.Event()

        def produce() -> None:
            last: BaseException | None = None
            try:
                for made in self._batches():
                    if not _put(ready, made, stop):
                        return
            except BaseException as error:  # whatever it is, it belongs to who waits for the batch
                last = error
            _put(ready, (last, []), stop)

        # no daemon: the interpreter must not end, and DALI with it, while a pipeline runs
        thread = threading.Thread(target=produce, name="dali")
        thread.start()
        try:
            while True:
                batch, refusals = ready.get()
                self._bad.note(refusals)
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()

    def _batches(self) -> Iterator[tuple[torch.Tensor | InputError, list[Refusal]]]:
        """While DALI makes one batch, the next one is read."""
        pipeline, self._pipeline = self._pipeline or self._build(), None
        running: _Running | None = None
        with ThreadPoolExecutor(self._threads) as readers:
            for items in itertools.chain(self._order, [None]):
                coming = None if items is None else self._read(readers, items)
                made = None
                if running is not None:
                    made, pipeline = self._finish(pipeline, running, readers)
                if coming is not None and coming.error is None:
                    self._start(pipeline, coming)
                if made is not None:
                    yield made
                running = coming
        self._pipeline = pipeline  # nothing is left in it

    def _read(self, readers: ThreadPoolExecutor, items: Sequence[tuple[int, int]], careful: bool = False) -> _Running:
        refusals: list[list[Refusal]] = [[] for _ in items]

        def read(position: int) -> Sample:
            epoch, i = items[position]
            return load_or_next(
                self._images,
                i,
                self._bad.limit,
                lambda candidate: self.sample(candidate, numbers(self._order.seed, epoch, i), careful),
                refusals[position],
            )

        samples, error = [], None
        try:
            samples = list(readers.map(read, range(len(items))))
        except InputError as refused:
            error = refused
        return _Running(items, samples, [one for of_item in refusals for one in of_item], error)

    def sample(self, i: int, uniform: Sequence[Sequence[float]], careful: bool = False) -> Sample:
        """Image i with the views that these numbers stand for; `careful` leaves no decoding to DALI."""
        content = self._images.encoded(i)
        size = None if careful else plain_jpeg(content)
        if size is None:
            image = decode(content, self._images.file(i))
            content, size = as_pnm(image), (image.height, image.width)
        draws = [draw(view, row, *size) for view, row in zip(self._views, uniform, strict=True)]
        return Sample(np.frombuffer(content, np.uint8), _union([one.box for one in draws]), draws)

    def _build(self) -> Pipeline:
        return self._built(_views, self._order.images_per_step, self._threads, views=self._views, colours=self._colours)

    def _built(self, define: Any, batch_size: int, threads: int, **options: Any) -> Pipeline:
        pipeline = define(
            gpu=self._device is not None,
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if self._device is None else self._device.index or 0,
            prefetch_queue_depth=1,
            seed=0,
            **options,
        )
        pipeline.build()
        return pipeline

    def _start(self, pipeline: Pipeline, batch: _Running) -> None:
        for name, values in _inputs(batch.samples, self._views, self._colours).items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()

    def _finish(
        self, pipeline: Pipeline, batch: _Running, readers: ThreadPoolExecutor
    ) -> tuple[tuple[torch.Tensor | InputError, list[Refusal]], Pipeline]:
        """The batch that runs, and the pipeline: a new one if DALI met an image that it cannot decode."""
        if batch.error is not None:
            return (batch.error, batch.refusals), pipeline
        try:
            outputs = pipeline.share_outputs()
        except RuntimeError:
            refused = self._refused(batch.samples) or range(len(batch.samples))
            again = self._read(readers, [batch.items[k] for k in refused], careful=True)
            batch.refusals += again.refusals
            pipeline = self._build()
            if again.error is not None:
                return (again.error, batch.refusals), pipeline
            for k, sample in zip(refused, again.samples, strict=True):
                batch.samples[k] = sample
            self._start(pipeline, batch)
            outputs = pipeline.share_outputs()
        try:
            return (self._collect(outputs, batch, readers), batch.refusals), pipeline
        finally:
            pipeline.release_outputs()

    def _refused(self, samples: Sequence[Sample]) -> list[int]:
        """Which ones DALI cannot decode, each tried by itself: it names none, and the others should stay as they are,
        so that no image's views depend on the batch that it comes in."""
        refused, pipeline = [], None
        for k, sample in enumerate(samples):
            pipeline = pipeline or self._built(_decoding, batch_size=1, threads=1)
            try:
                for name, values in _encoded([sample]).items():
                    pipeline.feed_input(name, values)
                pipeline.run()
            except RuntimeError:
                refused.append(k)
                pipeline = None  # it is of no use any more
        return refused

    def _collect(self, outputs: Sequence[Any], batch: _Running, readers: ThreadPoolExecutor) -> torch.Tensor:
        """What the pipeline made of the batch, copied into one tensor."""
        made = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if self._device is not None:
            return torch.cat(made).permute(0, 3, 1, 2)
        if self._colours:
            return torch.cat(made).add_(0.5).byte()
        size, count = self._views[0].image_size, len(batch.samples)
        result = torch.empty(len(made) * count, 3, size, size, dtype=torch.uint8)

        def finish_one(place: int) -> None:
            k, i = divmod(place, count)
            finish(self._views[k], batch.samples[i].draws[k], made[k][i], result[place])

        list(readers.map(finish_one, range(len(result))))
        return result


@dataclass
class _Running:
    """A batch that was read, or what kept it from being read."""

    items: Sequence[tuple[int, int]]
    samples: list[Sample]
    refusals: list[Refusal]
    error: InputError | None


def _put(ready: queue.Queue[Any], made: Any, stop: threading.Event) -> bool:
    """Whether there still was somebody to take it."""
    while not stop.is_set() and threading.main_thread().is_alive():
        try:
            ready.put(made, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
