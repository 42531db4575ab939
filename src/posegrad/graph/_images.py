"""How operators on images move the dimension of poses; see `_moves.py`.

Images are `[N, C, ...]`. Poses lie along N as a rule, and every image is treated by itself. They
may also lie along C, where an operator treats groups of channels apart, or along a dimension that a
kernel of size one leaves alone.
"""

from collections.abc import Callable

import torch

from posegrad.graph._axis import Axis, Facts, Rule
from posegrad.graph._moves import within_last

__all__ = [
    "convolved",
    "group_norm",
    "pooled",
    "pooled_to_size",
    "sampled",
    "shuffled_channels",
    "spread_channels",
    "spread_pixels",
]


def convolved(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A convolution, also a transposed one: groups of channels keep apart."""
    groups, padding, transposed = facts
    if arg == 2:  # the bias, [C]
        return _first_if_channels(axis)
    if axis.dim == 1:
        each = out[1] // groups
        if arg == 1 and not transposed:
            return axis._replace(dim=0)
        if arg == 1 and axis.owners is None and each % (axis.inner * axis.poses) == 0:
            return axis._replace(size=each)  # as in every group
        group = _coarser(axis, each)
        dim = 1 - arg
        return None if group is None else _finer(group, inside[dim] // groups)._replace(dim=dim)
    if arg == 1 or inside[axis.dim] != out[axis.dim]:
        return None
    if axis.dim > 1 and _at(padding, axis.dim - 2):
        return None
    return axis  # of the same size without padding, so the kernel's and the stride are one


def group_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Statistics of groups of channels, image by image."""
    if arg > 0:  # scale and shift, [C]
        return _first_if_channels(axis)
    if axis.dim == 1:
        return None if _coarser(axis, out[1] // facts[0]) is None else axis
    return axis if axis.dim == 0 else None


def pooled(count: int) -> Rule:
    """Pools along the last dimensions, so many, with a kernel of a size for each."""

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        at = axis.dim - (len(out) - count)
        if at < 0:
            return within_last(count)(facts, arg, axis, out, inside)
        (kernel,) = facts
        return _if_kept(axis, out, inside) if _at(kernel, at) == 1 else None

    return rule


def pooled_to_size(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Adaptive pools: a dimension that keeps its size is left alone."""
    return _if_kept(axis, out, inside)


def sampled(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """`grid_sample`: images `[N, C, ...]` at places `[N, ..., d]`, to `[N, C, ...]`."""
    if axis.dim == 0:
        return axis
    if arg == 0:
        return axis if axis.dim == 1 else None
    return axis._replace(dim=axis.dim - 1) if axis.dim > 1 else None


def shuffled_channels(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Channels change places."""
    return None if axis.dim == 1 else axis


def spread_channels(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`pixel_shuffle`: from `[..., C r r, H, W]` to `[..., C, H r, W r]`."""
    return _spread(_finer, _coarser, facts, axis, out)


def spread_pixels(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`pixel_unshuffle`: from `[..., C, H r, W r]` to `[..., C r r, H, W]`."""
    return _spread(_coarser, _finer, facts, axis, out)


Grain = Callable[[Axis, int], Axis | None]
"""From an axis and how many neighbours become one, or one becomes, to the axis they then have."""


def _at(values: tuple[int, ...], place: int) -> int:
    """The value for one of the last dimensions; one alone is that of all."""
    return values[place] if len(values) > 1 else values[0]


def _first_if_channels(axis: Axis) -> Axis | None:
    return axis._replace(dim=0) if axis.dim == 1 else None


def _if_kept(axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    return axis if len(inside) == len(out) and inside[axis.dim] == out[axis.dim] else None


def _spread(
    channels: Grain, pixels: Grain, facts: Facts, axis: Axis, out: torch.Size
) -> Axis | None:
    """Where the factor is squared among channels `[..., C, H, W]`, and plain among pixels."""
    (factor,) = facts
    if axis.dim == len(out) - 3:
        return channels(axis, factor**2)
    return pixels(axis, factor) if axis.dim > len(out) - 3 else axis


def _finer(axis: Axis, factor: int) -> Axis:
    """The axis of a dimension in which each entry has become several neighbours."""
    if axis.owners is not None:
        return axis.owned(axis.dim, axis.owners.repeat_interleave(factor))
    return axis._replace(inner=axis.inner * factor, size=axis.size * factor)


def _coarser(axis: Axis, factor: int) -> Axis | None:
    """The axis of a dimension in which several neighbours have become one.

    Returns:
        None if neighbours belong to different poses.
    """
    if factor == 1:
        return axis
    if axis.owners is not None or axis.inner % factor:
        return None
    return axis._replace(inner=axis.inner // factor, size=axis.size // factor)
