"""Conversion of a network to ONNX, and its verification against PyTorch with onnxruntime.

Needs the extra `onnx`: pip install 'dspnet-fast[onnx]'.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cost import parameter_count
from .errors import InputError
from .models import image_channels

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
INPUT = "images"
TOLERANCE = 1e-4
CONSTANTS_BYTES, NODE_BYTES = 4096, 1024


def require() -> None:
    """Raise InputError if a required package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}, not installed here: pip install 'dspnet-fast[onnx]'")


def convert(network: nn.Module, image_size: int, output: str = "features") -> bytes:
    """Convert a network cut out by `slim` to ONNX, from images float32 [batch, C, S, S] to [batch, F], with any batch
    size.

    Batch normalisation is folded into the convolutions. The exporter's notes about the source code, which contain
    paths, are removed.

    Args:
        network: a network of torch.nn layers; set to evaluation mode.
        image_size: height and width S of the images.
        output: name of the output: "features", or "logits" for a classifier.

    Returns:
        The content of the ONNX file.

    Raises:
        InputError: if a package is missing.
        RuntimeError: if the file's size does not fit the number of parameters.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> session = Session(convert(network, image_size=16))
        >>> session(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4, 8])
    """
    require()
    program = torch.onnx.export(
        network.eval(),
        (
            torch.zeros(2, image_channels(network), image_size, image_size),
        ),  # a batch of one would be exported as a constant
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[output],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
        noted.doc_string = ""
    del graph.value_info[:]
    model.producer_name, model.producer_version = "dspnet-fast", ""
    converted = model.SerializeToString()
    _check_size(network, model, len(converted))
    return converted


def _check_size(network: nn.Module, model: Any, size: int) -> None:
    """Check that weights are stored once and inline: 4 bytes per parameter, with batch normalisation folded."""
    parameters = parameter_count(network)
    folded = sum(2 * norm.num_features for norm in network.modules() if isinstance(norm, _BatchNorm))
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    least, most = 4 * (parameters - folded), 4 * (parameters + folded) + CONSTANTS_BYTES
    if not (least <= weights <= most and size - weights <= NODE_BYTES * len(model.graph.node)):
        raise RuntimeError(
            f"a network of {parameters:,} parameters became {size:,} bytes of ONNX with {weights:,} bytes of weights, "
            f"expected {least:,} to {most:,}: this version of torch or onnxscript is not supported"
        )


class Session:
    """onnxruntime on the CPU with a converted network: float32 [N, C, S, S] to [N, F], both on the CPU.

    Args:
        model: content of the ONNX file.
        threads: threads of onnxruntime; by default PyTorch's number.
    """

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        require()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        self.version: str = onnxruntime.__version__
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        """Features or logits of images."""
        (result,) = self._session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(result)


@torch.no_grad()
def verify(
    session: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor, runtime: str = "onnxruntime"
) -> float:
    """Compare a converted network with PyTorch on `images`, as one batch and image by image.

    Args:
        session: the converted network, such as a `Session`.
        network: the original network.
        images: normalised images, float32 [N, C, S, S], on the CPU.
        runtime: what runs the converted network, for messages.

    Returns:
        The largest absolute difference between the outputs of the two.

    Raises:
        RuntimeError: if a difference exceeds 1e-4, or 1e-4 of PyTorch's largest value if that is larger than 1.
    """
    expected = network.eval()(images)
    largest = 0.0
    for batch in (images, *images.split(1)):
        result, wanted = session(batch), expected if len(batch) == len(images) else network(batch)
        difference = (result - wanted).abs()
        if not (difference <= TOLERANCE * wanted.abs().max().clamp(min=1)).all():  # false for NaN too
            raise RuntimeError(
                f"the outputs of {runtime} differ from PyTorch's by up to {difference.max().item():.2g}: "
                "the file is not kept"
            )
        largest = max(largest, difference.max().item())
    return largest
