"""Conversion of a network to a program of torch.export, which PyTorch runs without the network's Python code."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn

from .models import image_channels
from .onnx_file import verify

NAME = "torch.export"
SOURCE_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")  # with paths and source lines


def convert(network: nn.Module, image_size: int) -> bytes:
    """Convert a network cut out by `slim` to a program of images float32 [batch, C, S, S], with any batch size.

    Notes about the source code, which contain paths, are removed.

    Args:
        network: a network of torch.nn layers; set to evaluation mode.
        image_size: height and width S of the images.

    Returns:
        The content of a file that `torch.export.load` reads.

    Raises:
        RuntimeError: if torch.export does not support the network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> program = torch.export.load(io.BytesIO(convert(network, image_size=16))).module()
        >>> program(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4, 8])
    """
    program = export(network, image_size)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # of storages that are larger than their tensor
        torch.export.save(program, content)
    return content.getvalue()


def export(network: nn.Module, image_size: int, any_batch: bool = True) -> torch.export.ExportedProgram:
    """The program of a network, before it is saved; other arguments and errors as of `convert`.

    Args:
        network: a network of torch.nn layers; set to evaluation mode.
        image_size: height and width S of the images.
        any_batch: whether the program takes any number of images, and not one.
    """
    count = 2 if any_batch else 1  # a batch of one would be a constant
    images = torch.zeros(count, image_channels(network), image_size, image_size)
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        program = torch.export.export(network.eval(), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"torch.export does not support the network: {reason}") from error
    for node in program.graph.nodes:
        for note in SOURCE_NOTES:
            node.meta.pop(note, None)
    return program


def compare(content: bytes, network: nn.Module, images: Tensor) -> float:
    """The largest difference between the outputs of a program and its network; arguments and errors as of
    `onnx_file.verify`."""
    return verify(torch.export.load(io.BytesIO(content)).module(), network, images, NAME)
