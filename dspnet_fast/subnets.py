"""Subnets (desired networks, DNs), the family they form, and which of them a training step uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from .errors import InputError


def make_divisible(channels: float) -> int:
    """Round to a multiple of 8, up where rounding down would lose more than a tenth (MobileNet's rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def width_name(width: float) -> str:
    """Name of the subnet of a width multiplier: 0.5 -> "w0.50", 0.625 -> "w0.625"."""
    return f"w{width:.2f}" if round(width, 2) == width else f"w{width!r}"


@dataclass(frozen=True)
class Subnet:
    """One desired network: a prefix of the channels and of the blocks of every stage.

    Attributes:
        name: what it is, for example "w0.50" or "c64-d2222".
        channels: output channels of the stem and of each stage, in the network's order.
        depths: number of blocks of each stage.
    """

    name: str
    channels: tuple[int, ...]
    depths: tuple[int, ...]

    def within(self, other: Subnet) -> bool:
        """Whether this subnet is a prefix of the other."""
        pairs = zip((*self.channels, *self.depths), (*other.channels, *other.depths), strict=True)
        return all(mine <= theirs for mine, theirs in pairs)

    def __str__(self) -> str:
        return self.name


class Family(Sequence[Subnet]):
    """The subnets that share one set of weights, smallest first; all are prefixes of the last, the full network.

    Raises InputError if the list is empty, names a network twice or does not nest.
    """

    def __init__(self, subnets: Iterable[Subnet]) -> None:
        self._subnets = tuple(sorted(subnets, key=_weight_estimate))
        if not self._subnets:
            raise InputError("a family needs at least one subnet")
        for previous, subnet in zip(self._subnets, self._subnets[1:], strict=False):
            if (previous.channels, previous.depths) == (subnet.channels, subnet.depths):
                raise InputError(f"{previous} and {subnet} are the same network: keep one of them")
        outside = [subnet.name for subnet in self._subnets if not subnet.within(self.full)]
        if outside:
            raise InputError(
                f"the family does not nest: {', '.join(outside)} is no prefix of the largest, {self.full}; "
                "add a subnet that has the most channels and the most blocks of every stage"
            )

    @property
    def smallest(self) -> Subnet:
        """The subnet with the fewest weights."""
        return self._subnets[0]

    @property
    def full(self) -> Subnet:
        """The network that contains all others."""
        return self._subnets[-1]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names, smallest first."""
        return tuple(subnet.name for subnet in self._subnets)

    @overload
    def __getitem__(self, index: int) -> Subnet: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Subnet, ...]: ...

    def __getitem__(self, index: int | slice) -> Subnet | tuple[Subnet, ...]:
        return self._subnets[index]

    def __len__(self) -> int:
        return len(self._subnets)

    def __iter__(self) -> Iterator[Subnet]:
        return iter(self._subnets)

    def find(self, name: str) -> Subnet:
        """Return the subnet of that name; InputError lists the names there are."""
        for subnet in self._subnets:
            if subnet.name == name:
                return subnet
        raise InputError(f"no subnet {name!r} in this family: it has {', '.join(self.names)}")


def _weight_estimate(subnet: Subnet) -> tuple[int, int]:
    """Order by the size of the largest convolutions: sum over stages of depth x channels^2; ties by channels."""
    stages = subnet.channels[-len(subnet.depths) :]
    return sum(d * c * c for d, c in zip(subnet.depths, stages, strict=True)), sum(subnet.channels)


def sandwich(family: Family, count: int, seed: int, step: int) -> list[Subnet]:
    """The subnets of one training step: smallest, `count` - 2 random others, and the full network last.

    A pure function of (seed, step): the same on every rank and after a resume (Yu & Huang 2019, sandwich rule;
    DSPNet section 4.1). The random ones are drawn without replacement from those between smallest and full;
    a family with fewer members than `count` is used whole.
    """
    if len(family) == 1:
        return [family.full]
    if count < 2:
        raise InputError(f"a step takes the smallest and the full network at least, not {count} subnets")
    between = family[1:-1]
    random = np.random.Generator(np.random.Philox(key=(seed, step)))
    drawn = random.permutation(len(between))[: count - 2]
    return [family.smallest, *(between[index] for index in drawn), family.full]
