"""Batches of views computed by DALI, on the CPU or on a GPU.

DALI samples nothing and reads no files: this module reads files in the order of the sampler, samples the parameters of
the views and feeds both to a pipeline (dali_pipeline.py). So a resumed run needs no state of DALI, and the views equal
those of the other backends up to arithmetic differences, which docs/data.md lists.
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

from ..bad_images import BadImages, Unreadable, load_or_next
from ..datasets.decoders import new_warnings
from ..datasets.images import ImageDataset, decode, encode_pnm
from ..sampler import EpochSampler
from .augmentation import ViewSpec, sample_view, uniform_numbers
from .dali_inputs import Sample, bounding_box, decode_inputs, plain_jpeg, view_inputs
from .dali_pipeline import decode_pipeline, view_pipeline
from .photometric import apply_photometric

PREFETCH = 2  # finished batches in the queue


class DaliLoader:
    """An iterable of batches, prefetched by one Python thread and DALI's own threads.

    A batch holds the first view of all B images, then the second view of all: uint8 [2B, 3, S, S] on the CPU, or on
    the GPU `device` float32, normalised, in channels-last memory. DALI decodes, crops and resizes. On a GPU it also
    applies the photometric operations; on the CPU `photometric.apply_photometric` does so in Python threads, which is
    faster.

    Args:
        images: the dataset.
        views: the distribution of each view.
        sampler: yields the (epoch, index) pairs of each batch.
        threads: of DALI, and of Python for reading files.
        bad: counts images that cannot be read; each is replaced by the next readable one.
        device: the GPU to compute on; None for the CPU.
        photometric: whether DALI applies the photometric operations. The default is to do so on a GPU only.

    Raises:
        InputError: while iterating, if more images are unreadable than `bad` allows.
    """

    def __init__(
        self,
        images: ImageDataset,
        views: tuple[ViewSpec, ...],
        sampler: EpochSampler,
        threads: int,
        bad: BadImages,
        device: torch.device | None = None,
        photometric: bool | None = None,
    ) -> None:
        self._images, self._views, self._sampler, self._threads, self._bad = images, views, sampler, threads, bad
        self._device = device
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._photometric = device is not None if photometric is None else photometric
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[torch.Tensor]:
        ready: queue.Queue[Any] = queue.Queue(PREFETCH)
        stop = threading.Event()

        def produce() -> None:
            last: BaseException | None = None
            try:
                for made in self._batches():
                    if not _put(ready, made, stop):
                        return
            except BaseException as error:  # raised again by the consumer
                last = error
            _put(ready, (last, []), stop)

        # not a daemon: the interpreter must not shut DALI down while a pipeline runs
        thread = threading.Thread(target=produce, name="dali")
        thread.start()
        try:
            while True:
                batch, unreadable = ready.get()
                self._bad.add_warnings(new_warnings())
                self._bad.add(unreadable)
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()

    def _batches(self) -> Iterator[tuple[torch.Tensor | InputError, list[Unreadable]]]:
        """Read the next batch while DALI computes the current one."""
        pipeline, self._pipeline = self._pipeline or self._build(), None
        pending: _PendingBatch | None = None
        with ThreadPoolExecutor(self._threads) as readers:
            for items in itertools.chain(self._sampler, [None]):
                coming = None if items is None else self._read(readers, items)
                made = None
                if pending is not None:
                    made, pipeline = self._finish(pipeline, pending, readers)
                if coming is not None and coming.error is None:
                    self._start(pipeline, coming)
                if made is not None:
                    yield made
                pending = coming
        self._pipeline = pipeline  # empty, so the next iteration can use it

    def _read(
        self, readers: ThreadPoolExecutor, items: Sequence[tuple[int, int]], use_pillow: bool = False
    ) -> _PendingBatch:
        unreadable: list[list[Unreadable]] = [[] for _ in items]

        def read(position: int) -> Sample:
            epoch, i = items[position]
            return load_or_next(
                self._images,
                i,
                self._bad.limit,
                lambda candidate: self.sample(candidate, uniform_numbers(self._sampler.seed, epoch, i), use_pillow),
                unreadable[position],
            )

        samples, error = [], None
        try:
            samples = list(readers.map(read, range(len(items))))
        except InputError as problem:
            error = problem
        return _PendingBatch(items, samples, [one for item in unreadable for one in item], error)

    def sample(self, i: int, uniform: Sequence[Sequence[float]], use_pillow: bool = False) -> Sample:
        """Read an image and sample its views.

        Args:
            i: index of the image.
            uniform: for each view `NUMBERS_PER_VIEW` numbers in [0, 1).
            use_pillow: whether to decode every format with Pillow.

        Raises:
            InputError: the image cannot be read.
        """
        content = self._images.encoded(i)
        size = None if use_pillow else plain_jpeg(content)
        if size is None:
            image = decode(content, self._images.file(i))
            content, size = encode_pnm(image), (image.height, image.width)
        parameters = [sample_view(view, row, *size) for view, row in zip(self._views, uniform, strict=True)]
        return Sample(np.frombuffer(content, np.uint8), bounding_box([one.box for one in parameters]), parameters)

    def _build(self) -> Pipeline:
        return self._compile(
            view_pipeline,
            self._sampler.images_per_step,
            self._threads,
            views=self._views,
            photometric=self._photometric,
        )

    def _compile(self, define: Any, batch_size: int, threads: int, **options: Any) -> Pipeline:
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

    def _start(self, pipeline: Pipeline, batch: _PendingBatch) -> None:
        for name, values in view_inputs(batch.samples, self._views, self._photometric).items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()

    def _finish(
        self, pipeline: Pipeline, batch: _PendingBatch, readers: ThreadPoolExecutor
    ) -> tuple[tuple[torch.Tensor | InputError, list[Unreadable]], Pipeline]:
        """Return the finished batch and the pipeline, a new one after an image that DALI could not decode."""
        if batch.error is not None:
            return (batch.error, batch.unreadable), pipeline
        try:
            outputs = pipeline.share_outputs()
        except RuntimeError:
            undecodable = self._undecodable(batch.samples) or range(len(batch.samples))
            again = self._read(readers, [batch.items[k] for k in undecodable], use_pillow=True)
            batch.unreadable += again.unreadable
            pipeline = self._build()
            if again.error is not None:
                return (again.error, batch.unreadable), pipeline
            for k, sample in zip(undecodable, again.samples, strict=True):
                batch.samples[k] = sample
            self._start(pipeline, batch)
            outputs = pipeline.share_outputs()
        try:
            return (self._collect(outputs, batch, readers), batch.unreadable), pipeline
        finally:
            pipeline.release_outputs()

    def _undecodable(self, samples: Sequence[Sample]) -> list[int]:
        """Return the positions of the samples that DALI cannot decode.

        DALI's error names no sample, so each is decoded alone. Pillow then decodes only those: otherwise the views of
        an image would depend on the other images of its batch.
        """
        undecodable, pipeline = [], None
        for k, sample in enumerate(samples):
            pipeline = pipeline or self._compile(decode_pipeline, batch_size=1, threads=1)
            try:
                for name, values in decode_inputs([sample]).items():
                    pipeline.feed_input(name, values)
                pipeline.run()
            except RuntimeError:
                undecodable.append(k)
                pipeline = None  # unusable after an error
        return undecodable

    def _collect(self, outputs: Sequence[Any], batch: _PendingBatch, readers: ThreadPoolExecutor) -> torch.Tensor:
        """Copy the pipeline's outputs into one tensor."""
        if self._stream is not None:
            return _to_tensor(outputs, self._stream)
        made = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if self._photometric:
            return torch.cat(made).add_(0.5).byte()
        size, count = self._views[0].image_size, len(batch.samples)
        result = torch.empty(len(made) * count, 3, size, size, dtype=torch.uint8)

        def finish_one(place: int) -> None:
            k, i = divmod(place, count)
            apply_photometric(self._views[k], batch.samples[i].views[k], made[k][i], result[place])

        list(readers.map(finish_one, range(len(result))))
        return result


@dataclass
class _PendingBatch:
    """A batch that was read and not yet returned, or the error that reading it raised."""

    items: Sequence[tuple[int, int]]
    samples: list[Sample]
    unreadable: list[Unreadable]
    error: InputError | None


def _put(ready: queue.Queue[Any], made: Any, stop: threading.Event) -> bool:
    """Put a batch into the queue; False if iteration has stopped."""
    while not stop.is_set() and threading.main_thread().is_alive():
        try:
            ready.put(made, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _to_tensor(outputs: Sequence[Any], stream: torch.cuda.Stream) -> torch.Tensor:
    """Concatenate outputs on a GPU and wait for the copy, as DALI reuses its memory afterwards.

    In a separate stream: the training stream has queued work that the wait would include.
    """
    with torch.cuda.stream(stream):
        result = torch.cat([torch.from_dlpack(output.as_tensor()) for output in outputs]).permute(0, 3, 1, 2)
    stream.synchronize()
    result.record_stream(torch.cuda.default_stream(stream.device))
    return result
