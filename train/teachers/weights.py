"""Weights of other libraries, matched with a network by name or by order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dspnet_fast.errors import InputError

ENCODERS = ("encoder_q.", "backbone.", "teacher.backbone.")  # of the network to use, where a file holds several
HEADS = ("projection_head.", "projector.", "prototypes.", "predictor.")  # beside the network in self-supervised models
COUNTER = "num_batches_tracked"  # of batch normalisation: unused in evaluation, and missing in old files
SHOWN = 3  # tensors that an error message names


def match(
    network: nn.Module, tensors: Mapping[str, Tensor], classifiers: Sequence[str], ordered: bool = True
) -> tuple[dict[str, Tensor], bool]:
    """Match the tensors of a file with those of a network.

    The names in the file may have a common prefix, such as `encoder_q.` of MoCo, beside other networks and heads. By
    order means: the file's names are different, but its tensors have the shapes of the network's, in the same
    order; the file may have a classifier's weight and bias at the end.

    Args:
        network: a network without classifier.
        tensors: tensors of a file by name.
        classifiers: names of the classifier's modules, whose tensors are left out.
        ordered: whether the file keeps the order of the network's tensors; .safetensors files are sorted.

    Returns:
        A state_dict of the network, without counters of batch normalisation, and whether it was matched by order.

    Raises:
        InputError: tensors are missing or have other shapes; the message names the first of them.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    unused = (*HEADS, *(f"{classifier}." for classifier in classifiers))
    body = {name: tensor for name, tensor in _inner(own, given).items() if not name.startswith(unused)}
    if body.keys() == own.keys():
        wrong = [
            f"{name} is {list(body[name].shape)}, not {list(own[name].shape)}"
            for name in own
            if body[name].shape != own[name].shape
        ]
        if wrong:
            raise InputError(f"{len(wrong)} tensors have other shapes: {'; '.join(wrong[:SHOWN])}")
        return body, False
    values, more = list(given.values())[: len(own)], list(given.values())[len(own) :]
    same = [tensor.shape for tensor in values] == [tensor.shape for tensor in own.values()]
    if ordered and same and len(more) <= 2 and all(tensor.ndim <= 2 for tensor in more):
        return dict(zip(own, values, strict=True)), True
    raise InputError(_difference(own, body))


def _inner(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the prefix that leads to the network's names; all tensors if there is none or it is empty."""
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in given if name.endswith(first)]
    fitting = [prefix for prefix in prefixes if all(prefix + name in given for name in own)]
    if len(fitting) > 1 and "" not in fitting:
        known = [prefix for prefix in ENCODERS if prefix in fitting]
        if not known:
            raise InputError(f"the file holds several such networks, {', '.join(fitting)}: save the tensors of one")
        fitting = known
    prefix = fitting[0] if fitting and "" not in fitting else ""
    return {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}


def _difference(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    missing = [f"{name} {list(own[name].shape)}" for name in own if name not in given]
    unknown = [f"{name} {list(given[name].shape)}" for name in given if name not in own]
    parts = []
    for names, what in ((missing, "the file lacks"), (unknown, "the network has no")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{what} {', '.join(names[:SHOWN])}{more}")
    return "; ".join(parts)
