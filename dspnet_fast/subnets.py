"""Subnets (desired networks, DNs), families of them, and the choice of subnets for a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from .errors import InputError


def make_divisible(channels: float) -> int:
    """Round to a multiple of 8, upwards if rounding down would remove more than a tenth (MobileNet's rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def width_name(width: float) -> str:
    """Name of the subnet of a width multiplier: 0.5 -> "w0.50", 0.625 -> "w0.625"."""
    return f"w{width:.2f}" if round(width, 2) == width else f"w{width!r}"


@dataclass(frozen=True)
class Subnet:
    """One desired network: a prefix of the channels and of the blocks of every stage.

    Attributes:
        name: for example "w0.50" or "c64-d2222".
        channels: output channels of the stem and of each stage, in the network's order.
        depths: number of blocks of each stage.

    Example:
        >>> small, large = Subnet("c8-d1", (8, 8), (1,)), Subnet("c16-d2", (16, 16), (2,))
        >>> small.within(large), large.within(small)
        (True, False)
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
    """Subnets that share one set of weights, smallest first; each is a prefix of the last, the full network.

    Args:
        subnets: the subnets, in any order.

    Raises:
        InputError: if the list is empty, contains a network twice, or no subnet contains all others.

    Example:
        >>> family = Family([Subnet("c16-d2", (16, 16), (2,)), Subnet("c8-d1", (8, 8), (1,))])
        >>> family.names, family.full.name
        (('c8-d1', 'c16-d2'), 'c16-d2')
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
        """The subnets' names, smallest first."""
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
        """Return the subnet with this name; InputError lists the existing names."""
        for subnet in self._subnets:
            if subnet.name == name:
                return subnet
        raise InputError(f"no subnet {name!r} in this family: it has {', '.join(self.names)}")


def _weight_estimate(subnet: Subnet) -> tuple[int, int]:
    """Sort key, an estimate of the weights: sum over stages of depth x channels^2, then all channels and blocks.

    A network of more stages than channels has no channels for the first ones.
    """
    pairs = zip(reversed(subnet.depths), reversed(subnet.channels), strict=False)
    return sum(d * c * c for d, c in pairs), sum(subnet.channels) + sum(subnet.depths)


def sandwich(family: Family, count: int, seed: int, step: int) -> list[Subnet]:
    """Draw the subnets of a training step: the smallest, `count` - 2 random others, and the full network last.

    A pure function of (seed, step), so it is the same on every rank and after a resume (sandwich rule, Yu & Huang 2019;
    DSPNet section 4.1). The random ones are drawn without replacement.

    Args:
        family: the family to draw from.
        count: number of subnets; a family with fewer members is used whole.
        seed: the run's seed.
        step: the training step.

    Returns:
        The subnets, from the smallest to the full network.

    Raises:
        InputError: if `count` is less than 2 for a family of several subnets.

    Example:
        >>> family = Family([Subnet(f"c{c}-d1", (c, c), (1,)) for c in (8, 12, 16, 20)])
        >>> [subnet.name for subnet in sandwich(family, 2, seed=0, step=0)]
        ['c8-d1', 'c20-d1']
    """
    if len(family) == 1:
        return [family.full]
    if count < 2:
        raise InputError(f"a step needs at least 2 subnets, the smallest and the full network, got {count}")
    between = family[1:-1]
    random = np.random.Generator(np.random.Philox(key=(seed, step)))
    drawn = random.permutation(len(between))[: count - 2]
    return [family.smallest, *(between[index] for index in drawn), family.full]
