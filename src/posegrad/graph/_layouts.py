"""Where the poses of a tensor lie: along one dimension, or it belongs to one pose as a whole."""

from collections.abc import Callable
from typing import Any

import torch

from posegrad.jacobian import NOBODY, Layout

__all__ = ["Facts", "Move", "agreed", "dim_of", "layout_in"]


Facts = tuple[Any, ...]
"""What an operator was told beside tensors, as dimensions and paddings; in the order of its kind's
`told`."""

Move = Callable[[Facts, int, Layout, torch.Size, torch.Size], Layout | None]
"""From an operator's facts, the number of an argument, the layout of the output, and the shapes of
output and argument to the layout of the argument. None if poses may mix in it, or all share it.

A move sees no tensor, so what it says holds for every graph of the same structure.
"""


def layout_in(
    shape: torch.Size, stride: int, count: int, device: torch.device | None
) -> Layout | None:
    """The layout of a shape whose poses have a stride; None if they do not lie along one dimension.

    Args:
        shape: The shape.
        stride: How many neighbouring numbers belong to one pose.
        count: How many poses there are.
        device: Where the layout is to lie.
    """
    step = 1
    if 0 in shape:
        return None
    for dim in reversed(range(len(shape))):
        if shape[dim] > 1 and stride < step * shape[dim]:
            inner, rest = divmod(stride, step)
            whole = rest == 0 and shape[dim] % (inner * count) == 0
            return Layout.regular(count, dim, shape[dim], inner, device) if whole else None
        step *= shape[dim]
    return None


def agreed(first: Layout | None, second: Layout | None) -> Layout | None:
    """The layout of a sum of two cotangents; None if they belong to different poses somewhere."""
    if first is None or second is None:
        return None
    if first is second:
        return first
    if (first.dims, first.size) != (second.dims, second.size):
        return None
    if first.pattern is not None and second.pattern is not None:
        return first if first.pattern == second.pattern else None
    if first.stated is second.stated:
        return first
    stated = second if first.pattern is not None else first
    device = stated.owners.device
    one, other = first.to(device).owners, second.to(device).owners
    if torch.equal(one, other):
        return stated
    alike = (one == other) | (one == NOBODY) | (other == NOBODY)
    return first.owned(first.dim, torch.maximum(one, other)) if bool(alike.all()) else None


def dim_of(value: int, ndim: int) -> int:
    """A dimension from 0; negative ones are saved as unsigned numbers."""
    value = value - 2**64 if value >= 2**63 else value
    return value + ndim if value < 0 else value
