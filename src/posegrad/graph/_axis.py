"""Where the poses of a tensor lie: in one dimension."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posegrad.jacobian import NOBODY, Layout

__all__ = ["WHOLE", "Axis", "Facts", "Rule", "agreed", "axis_in", "dim_of"]


WHOLE = -1
"""The dimension of a tensor that belongs to a single pose as a whole."""


class Axis(NamedTuple):
    """Where the poses of a tensor lie: in one dimension, unless it is a single pose's.

    Args:
        dim: The dimension, or `WHOLE`.
        poses: m, their number.
        inner: How many neighbours along it belong to one pose, if its size is
            `outer * poses * inner`.
        size: Its size.
        owners: The pose of each entry along it, `[size]`, if they follow no such pattern; of a
            whole tensor its own.
    """

    dim: int
    poses: int
    inner: int
    size: int
    owners: Tensor | None = None

    def spelled(self, device: torch.device) -> Tensor:
        """The pose of each entry, `[size]`."""
        if self.owners is not None:
            return self.owners.to(device)
        return Layout.regular(self.poses, self.dim, self.size, self.inner, device).owners

    @property
    def is_whole(self) -> bool:
        """Whether the whole tensor belongs to one pose."""
        return self.dim == WHOLE

    def part(self, start: int, stop: int) -> "Axis":
        """The axis of entries that are cut out along it."""
        return self.owned(self.dim, self.spelled(_CPU)[start:stop])

    def entry(self, place: int) -> "Axis":
        """The axis of one entry by itself: it belongs to one pose as a whole."""
        return self.owned(WHOLE, self.spelled(_CPU)[place : place + 1])

    def within(self, dim: int, size: int, places: slice) -> "Axis":
        """The axis of a tensor that it was cut out of along a dimension; the rest is nobody's."""
        owners = torch.full((size,), NOBODY, device=_CPU)
        owners[places] = self.spelled(_CPU)
        return self.owned(dim, owners)

    def owned(self, dim: int, owners: Tensor) -> "Axis":
        """An axis of the same poses with owners of its own."""
        return Axis(dim, self.poses, 0, len(owners), owners)

    def layout(self, device: torch.device) -> Layout:
        """The layout of a tensor with this axis."""
        if self.is_whole:
            return Layout(self.poses, (), self.spelled(_CPU).to(device))
        if self.owners is not None:
            return Layout.along(self.poses, self.dim, self.owners.to(device))
        return Layout.regular(self.poses, self.dim, self.size, self.inner, device)


_CPU = torch.device("cpu")


def agreed(first: Axis | None, second: Axis | None) -> Axis | None:
    """The axis of a sum of two cotangents; None if they belong to different poses somewhere."""
    if first is None or second is None or (first.dim, first.size) != (second.dim, second.size):
        return None
    named = second.owners if first.owners is None else first.owners
    if first.owners is second.owners:
        return first if named is not None or first.inner == second.inner else None
    assert named is not None
    one, other = first.spelled(named.device), second.spelled(named.device)
    if torch.equal(one, other):
        return second if first.owners is None else first
    alike = (one == other) | (one == NOBODY) | (other == NOBODY)
    return first.owned(first.dim, torch.maximum(one, other)) if bool(alike.all()) else None


Facts = tuple[Any, ...]
"""What an operator was told beside tensors: dimensions, paddings; in the order of its kind."""

Rule = Callable[[Facts, int, Axis, torch.Size, torch.Size], Axis | None]
"""From an operator's facts, the number of an argument, the axis of the output, and the shapes of
output and argument to the axis of the argument. None if poses may mix there, or all meet there.

A rule sees no tensor, so what it says holds for every graph of the same structure.
"""


def axis_in(shape: torch.Size, stride: int, count: int) -> Axis | None:
    """The dimension of a shape that holds poses of that stride; None if no single one does."""
    step = 1
    if 0 in shape:
        return None
    for dim in reversed(range(len(shape))):
        if shape[dim] > 1 and stride < step * shape[dim]:
            inner, rest = divmod(stride, step)
            whole = rest == 0 and shape[dim] % (inner * count) == 0
            return Axis(dim, count, inner, shape[dim]) if whole else None
        step *= shape[dim]
    return None


def dim_of(value: int, ndim: int) -> int:
    """A dimension from 0; negative ones are saved as unsigned numbers."""
    value = value - 2**64 if value >= 2**63 else value
    return value + ndim if value < 0 else value
