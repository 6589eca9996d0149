"""A network as ONNX, and the proof by onnxruntime that it computes what PyTorch computes.

Needs the extra of that name: pip install 'dspnet-fast[onnx]'.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cost import parameter_count
from .errors import InputError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
INPUT = "images"
TOLERANCE = 1e-4
CONSTANTS_BYTES, NODE_BYTES = 4096, 1024


def require() -> None:
    """InputError if a package that this needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}, not installed here: pip install 'dspnet-fast[onnx]'")


def convert(network: nn.Module, image_size: int, output: str = "features") -> bytes:
    """Convert a network that `slim` cut out: images float32 [batch, 3, S, S], batch free, to [batch, F].

    What comes out is called `output`: features, or the logits of a classifier.

    Batch normalisation is folded into the convolutions. What the exporter notes about the source code, its paths among
    it, is left out.

    Raises:
        InputError: if a package is missing.
        RuntimeError: if the file is not as large as the parameters say.
    """
    require()
    program = torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 3, image_size, image_size),),  # an example of one would fix the batch at one
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
    """Weights once and in the file itself: a parameter is 4 bytes, only those of batch normalisation are folded."""
    parameters = parameter_count(network)
    folded = sum(2 * norm.num_features for norm in network.modules() if isinstance(norm, _BatchNorm))
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    least, most = 4 * (parameters - folded), 4 * (parameters + folded) + CONSTANTS_BYTES
    if not (least <= weights <= most and size - weights <= NODE_BYTES * len(model.graph.node)):
        raise RuntimeError(
            f"a network of {parameters:,} parameters became {size:,} bytes of ONNX with {weights:,} bytes of weights, "
            f"not {least:,} to {most:,}: this version of torch or onnxscript converts in another way than was expected"
        )


class Session:
    """onnxruntime on the CPU with a converted network: float32 [N, 3, S, S] to [N, F], both on the CPU.

    Args:
        model: a file's bytes.
        threads: of onnxruntime, by default as many as PyTorch has.
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
        """Features of images, or logits."""
        (result,) = self._session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(result)


@torch.no_grad()
def verify(session: Session, network: nn.Module, images: Tensor) -> float:
    """The largest difference between what onnxruntime and PyTorch make of `images`, as one batch and one by one.

    Raises:
        RuntimeError: if one is more than 1e-4 apart from PyTorch's, or than 1e-4 of it where it is larger than 1.
    """
    expected = network.eval()(images)
    largest = 0.0
    for batch in (images, *images.split(1)):
        result, wanted = session(batch), expected if len(batch) == len(images) else network(batch)
        difference = (result - wanted).abs()
        if not (difference <= TOLERANCE * wanted.abs().clamp(min=1)).all():  # NaN is not
            raise RuntimeError(
                f"onnxruntime's results differ from PyTorch's by {difference.max().item():.2g}: not kept"
            )
        largest = max(largest, difference.max().item())
    return largest
