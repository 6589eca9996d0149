"""Conversion of a network to formats for devices: fp16 and int8 ONNX, OpenVINO and ExecuTorch.

int8 is post-training static quantization: the ranges of activations are measured on calibration images. Needs the extra
`onnx`, for OpenVINO the extra `openvino`, and for ExecuTorch the extra `executorch`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onnx_file, program_file
from .errors import InputError, first_line

# Files of each format, and the smallest mean cosine similarity to PyTorch's outputs with which they are kept.
FILES = {
    "onnx-fp16": ("model.fp16.onnx",),
    "onnx-int8": ("model.int8.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "executorch": ("model.pte",),
}
SMALLEST_COSINE = {"onnx-fp16": 0.999, "onnx-int8": 0.8, "openvino": 0.99999, "executorch": 0.99999}
LIBRARIES = {"openvino": "OpenVINO", "executorch": "ExecuTorch"}  # of formats whose packages and extras have their name
CALIBRATION_BATCH = 16


@dataclass
class Converted:
    """A network in another format.

    Attributes:
        files: content by file name.
        run: computes features or logits [N, F] of images, float32 [N, 3, S, S], on the CPU.
        runtime: name and version of the library that `run` uses.
    """

    files: dict[str, bytes]
    run: Callable[[Tensor], Tensor]
    runtime: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))


def require(formats: Sequence[str]) -> None:
    """Raise InputError if a format is unknown or its package is missing."""
    for name in formats:
        if name not in FILES:
            raise InputError(f"--formats {name}: give some of {', '.join(FILES)}, separated by commas")
    if formats:
        onnx_file.require()
    for name, library in LIBRARIES.items():
        if name in formats and importlib.util.find_spec(name) is None:
            raise InputError(
                f"the format {name} needs {library}, not installed here: pip install 'dspnet-fast[{name}]'"
            )


def convert(name: str, network: nn.Module, model: bytes, calibration: Tensor, threads: int | None = None) -> Converted:
    """Convert a network.

    Args:
        name: key of FILES.
        network: the network in PyTorch, on the CPU; set to evaluation mode.
        model: content of its ONNX file in fp32.
        calibration: normalised images [N, C, S, S] on the CPU, for int8.
        threads: threads of the runtime; by default PyTorch's number.

    Raises:
        InputError: if a package is missing.
        RuntimeError: if the format does not support the network.
    """
    require([name])
    if name == "openvino":
        return _openvino(model, threads)
    if name == "executorch":
        return _executorch(network, calibration.shape[-1], threads)
    content = _fp16(model) if name == "onnx-fp16" else _int8(model, calibration)
    session = onnx_file.Session(content, threads)
    return Converted({FILES[name][0]: content}, session, f"onnxruntime {session.version}")


def _fp16(model: bytes) -> bytes:
    """Weights and activations in fp16; input and output stay in fp32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True).SerializeToString()


def _int8(model: bytes, calibration: Tensor) -> bytes:
    """Weights per channel and activations per tensor in int8, as pairs of quantize and dequantize nodes."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(calibration.split(CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {onnx_file.INPUT: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, quantized = (Path(folder) / name for name in ("whole.onnx", "prepared.onnx", "int8.onnx"))
        whole.write_bytes(model)
        quantization.shape_inference.quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(prepared, quantized, Reader(), per_channel=True)
        return quantized.read_bytes()


def _openvino(model: bytes, threads: int | None) -> Converted:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        source.write_bytes(model)
        converted = openvino.convert_model(source)
        target = Path(folder) / FILES["openvino"][0]
        openvino.save_model(converted, target, compress_to_fp16=False)
        files = {name: (Path(folder) / name).read_bytes() for name in FILES["openvino"]}
    # OpenVINO would compute in bf16 where the processor has it, and use all cores.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return Converted(files, run, f"openvino {openvino.__version__.split('-')[0]}")


def _executorch(network: nn.Module, image_size: int, threads: int | None) -> Converted:
    """A program for XNNPACK, of one image."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool  # there is no other setting
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads or torch.get_num_threads())
    # ExecuTorch's passes fail on weights in channels-last memory.
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    program = program_file.export(plain, image_size, any_batch=False)
    try:
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        content = bytes(lowered.to_executorch().buffer)
        method = Runtime.get().load_program(content).load_method("forward")
    except Exception as error:  # of many types
        raise RuntimeError(f"ExecuTorch does not support the network: {first_line(error)}") from error

    def run(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image.contiguous()])[0] for image in images.split(1)])

    return Converted({FILES["executorch"][0]: content}, run, f"executorch {importlib.metadata.version('executorch')}")


@torch.no_grad()
def compare(name: str, converted: Converted, network: nn.Module, images: Tensor) -> dict[str, float]:
    """Compare a converted network with PyTorch on `images`, as one batch and image by image.

    Args:
        name: key of FILES.
        converted: the network in this format.
        network: the network in PyTorch.
        images: normalised images, float32 [N, 3, S, S], on the CPU.

    Returns:
        The largest absolute difference of outputs, and the mean cosine similarity.

    Raises:
        RuntimeError: if the similarity is below SMALLEST_COSINE.
    """
    expected = network.eval()(images)
    results = converted.run(images), torch.cat([converted.run(image) for image in images.split(1)])
    cosine = min(F.cosine_similarity(result, expected).mean().item() for result in results)
    if not cosine >= SMALLEST_COSINE[name]:  # false for NaN too
        raise RuntimeError(
            f"outputs of {name} have a cosine similarity of {cosine:.3g} with PyTorch's, below {SMALLEST_COSINE[name]}"
        )
    return {"largest_difference": max((r - expected).abs().max().item() for r in results), "cosine": cosine}
