"""Stages of a traced network: blocks of one class that follow each other, of which a subnet runs the first ones.

A block can be left out if its output has the shape and the channels of its input, as with a residual sum: the next
module then gets the input instead.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from .selected import Skippable, skippable_class

CONTAINERS = (nn.Sequential, nn.ModuleList)
SHOWN = 3  # reasons in a message


@dataclass(frozen=True)
class Stage:
    """Blocks of one class that follow each other.

    Attributes:
        name: path of the module that contains the blocks, or another name if it is not unique.
        blocks: paths of the blocks, in their order.
        least: number of blocks that every subnet has, at least 1.
    """

    name: str
    blocks: tuple[str, ...]
    least: int

    def check(self, depth: int) -> None:
        """Raise ValueError for a number of blocks that no subnet has."""
        if not self.least <= depth <= len(self.blocks):
            raise ValueError(f"{self.name} has {self.least} to {len(self.blocks)} blocks: it cannot have {depth}")


def repeated_blocks(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Two or more children of one class that follow each other, and have children themselves: parent and blocks."""
    found = []
    for path, parent in model.named_modules():
        start = f"{path}." if path else ""
        for kind, run in itertools.groupby(parent.named_children(), key=lambda child: type(child[1])):
            children = list(run)
            if len(children) > 1 and not issubclass(kind, CONTAINERS) and any(children[-1][1].children()):
                found.append((path, tuple(start + name for name, _ in children)))
    return found


def stages_of(
    model: nn.Module, returned: dict[nn.Module, str], names: Container[str]
) -> tuple[tuple[Stage, ...], tuple[str, ...]]:
    """The stages of a network.

    Args:
        model: the network.
        returned: by block that ran, why it cannot be left out; an empty text if it can.
        names: names that stages must not have.

    Returns:
        The stages, and why other blocks that repeat cannot be left out.
    """
    stages: list[Stage] = []
    reasons: list[str] = []
    for parent, blocks in repeated_blocks(model):
        if any(parent == outer or parent.startswith(f"{outer}.") for stage in stages for outer in stage.blocks):
            continue
        fixed = [returned.get(model.get_submodule(block), "it does not run") for block in blocks]
        least = max((index + 1 for index, reason in enumerate(fixed) if reason), default=1)
        if least == len(blocks):
            reasons.append(f"{blocks[-1]} ({type(model.get_submodule(blocks[-1])).__name__}): {fixed[-1]}")
            continue
        taken = {stage.name for stage in stages}
        options = (parent, blocks[0], f"{blocks[0]}:blocks")
        name = next(option for option in options if option and option not in names and option not in taken)
        stages.append(Stage(name, blocks, least))
    return tuple(stages), tuple(reasons)


def use_stages(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Make the blocks that a subnet may leave out skippable, in place."""
    for stage in stages:
        for block in stage.blocks[stage.least :]:
            module = model.get_submodule(block)
            module.__class__ = skippable_class(module)


def remove_block(model: nn.Module, path: str) -> None:
    """Remove a block from its container; in a module of another class an nn.Identity takes its place."""
    parent, _, name = path.rpartition(".")
    container = model.get_submodule(parent)
    if isinstance(container, CONTAINERS):
        del container._modules[name]
    else:
        container._modules[name] = nn.Identity()


def removed_blocks(stages: Sequence[Stage], depths: Sequence[int]) -> Iterator[str]:
    """Paths of the blocks that a subnet of these depths does not have."""
    for stage, depth in zip(stages, depths, strict=True):
        yield from stage.blocks[depth:]


@torch.no_grad()
def verified_stages(model: nn.Module, stages: Sequence[Stage], inputs: Sequence[Any]) -> tuple[Stage, ...]:
    """The stages whose blocks can be removed as well as skipped; with `use_stages` applied to the model."""
    if not stages or _removable(model, stages, inputs):
        return tuple(stages)
    return tuple(stage for stage in stages if _removable(model, [stage], inputs))


def _removable(model: nn.Module, stages: Sequence[Stage], inputs: Sequence[Any]) -> bool:
    """Whether the network without the blocks computes the same as if it skips them."""
    cut = copy.deepcopy(model)
    paths = list(removed_blocks(stages, [stage.least for stage in stages]))
    blocks = [model.get_submodule(path) for path in paths]
    try:
        for block in blocks:
            assert isinstance(block, Skippable)
            block.skipped = True
        expected = _tensors(model(*inputs))
        for path in paths:
            remove_block(cut, path)
        found = _tensors(cut(*inputs))
    except Exception:  # a forward method that needs its blocks
        return False
    finally:
        for block in blocks:
            vars(block).pop("skipped", None)
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(one.shape == other.shape and one.equal(other) for one, other in pairs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tree_iter(outputs) if isinstance(tensor, Tensor)]


def no_stages(reasons: Sequence[str]) -> str:
    """Why a network has no stages."""
    if not reasons:
        return "it has no blocks of one class that follow each other"
    more = f", and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more
