"""DALI's way of carrying out Draws: whole batches, on the CPU or on a GPU.

DALI draws nothing and reads no files. Files are read and Draws are made here, in the order that is asked for; what the
pipeline gets is a batch of JPEGs and the numbers of their views. So a run is resumed without any state of DALI's, and
an image's views are the ones that every other backend makes, but for the arithmetic: docs/data.md says how far apart.

What DALI computes is in dali_pipeline.py, what it is given in dali_inputs.py.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from dspnet_fast.errors import InputError

from ..bad_images import BadImages, Refusal, load_or_next
from ..datasets.images import ImageSet, as_pnm, decode
from ..sampler import EpochSampler
from .augmentation import ViewSpec, draw, numbers
from .dali_inputs import Sample, for_decoding, for_viewing, plain_jpeg, union
from .dali_pipeline import decoding, viewing
from .photometric import finish

READY = 2  # batches that wait to be used, beside the one in the making


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
        order: EpochSampler,
        threads: int,
        bad: BadImages,
        device: torch.device | None = None,
        colours: bool | None = None,
    ) -> None:
        self._images, self._views, self._order, self._threads, self._bad = images, views, order, threads, bad
        self._device = device
        self._stream = None if device is None else torch.cuda.Stream(device)
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
        return Sample(np.frombuffer(content, np.uint8), union([one.box for one in draws]), draws)

    def _build(self) -> Pipeline:
        return self._built(
            viewing, self._order.images_per_step, self._threads, views=self._views, colours=self._colours
        )

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
        for name, values in for_viewing(batch.samples, self._views, self._colours).items():
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
            pipeline = pipeline or self._built(decoding, batch_size=1, threads=1)
            try:
                for name, values in for_decoding([sample]).items():
                    pipeline.feed_input(name, values)
                pipeline.run()
            except RuntimeError:
                refused.append(k)
                pipeline = None  # it is of no use any more
        return refused

    def _collect(self, outputs: Sequence[Any], batch: _Running, readers: ThreadPoolExecutor) -> torch.Tensor:
        """What the pipeline made of the batch, copied into one tensor."""
        if self._stream is not None:
            return _copied(outputs, self._stream)
        made = [torch.from_dlpack(output.as_tensor()) for output in outputs]
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


def _copied(outputs: Sequence[Any], stream: torch.cuda.Stream) -> torch.Tensor:
    """On a GPU, complete when this returns, as DALI then takes its memory back. Not in the stream that trains, which is
    full of work to come."""
    with torch.cuda.stream(stream):
        result = torch.cat([torch.from_dlpack(output.as_tensor()) for output in outputs]).permute(0, 3, 1, 2)
    stream.synchronize()
    result.record_stream(torch.cuda.default_stream(stream.device))
    return result
