"""Subnets of forward passes that a backward pass repeats.

With `torch.utils.checkpoint` the backward pass runs modules again, when another subnet may be active than in the
forward pass. Autograd numbers the nodes of its graph. `activate` notes the number of the next node, so that the node
whose backward pass runs tells which subnet was active when it was made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from weakref import WeakKeyDictionary

import torch
from torch import nn

KEPT = 1000  # notes per model, at least

Activate = Callable[[nn.Module], AbstractContextManager]  # activates a subnet


class _Notes:
    """Which subnet of a model is active from which node on; before the first note, the full network."""

    def __init__(self, full: Activate) -> None:
        self.numbers = [-1]
        self.subnets = [full]
        self.active = 0  # index of the note that holds now

    def add(self, subnet: Activate) -> None:
        """Note a subnet that is active from the next node on."""
        number = torch.autograd._get_sequence_nr()
        if number == self.numbers[-1]:
            self.subnets[-1] = subnet
        else:
            self.numbers.append(number)
            self.subnets.append(subnet)
        if len(self.numbers) > 2 * KEPT:
            del self.numbers[:KEPT], self.subnets[:KEPT]
        self.active = len(self.numbers) - 1


class _Followed:
    """The subnets that `follow` has activated, until the backward pass ends.

    Attributes:
        task: the call of `backward` in which they were activated, or None. Checkpoints in checkpoints call it again.
        busy: whether they are being activated or undone.
    """

    def __init__(self) -> None:
        self.task: int | None = None
        self.busy = False
        self._undo = ExitStack()

    def activate(self, model: nn.Module, subnet: Activate) -> None:
        if self.task is None:
            torch.autograd.Variable._execution_engine.queue_callback(self.undo)
            self.task = torch._C._current_graph_task_id()
        self.busy = True
        self._undo.enter_context(subnet(model))
        self.busy = False

    def undo(self) -> None:
        self.busy = True
        self._undo.close()
        self.busy = False
        self.task = None
        for notes in _notes.values():
            notes.active = len(notes.numbers) - 1


_notes: WeakKeyDictionary[nn.Module, _Notes] = WeakKeyDictionary()
_followed = _Followed()


def note(model: nn.Module, subnet: Activate, full: Activate) -> Activate:
    """Note that a subnet of a model becomes active; returns the one that was active before."""
    if torch.compiler.is_compiling() or _followed.busy:
        return full
    if _followed.task is not None:  # an error has ended the backward pass
        _followed.undo()
    notes = _notes.setdefault(model, _Notes(full))
    before = notes.subnets[notes.active]
    notes.add(subnet)
    return before


def follow() -> None:
    """In a backward pass, activate the subnets of the forward pass that it repeats, until the backward pass ends."""
    if torch.compiler.is_compiling():
        return
    task = torch._C._current_graph_task_id()
    if task == -1:
        return
    node = torch._C._current_autograd_node()
    if node is None or _followed.task not in (None, task):
        return
    for model, notes in list(_notes.items()):
        index = max(0, bisect_right(notes.numbers, node._sequence_nr()) - 1)
        if index != notes.active:
            _followed.activate(model, notes.subnets[index])
            notes.active = index
