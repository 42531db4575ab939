"""How operators on images move the dimension of poses; see `_moves.py`.

Images are `[N, C, ...]`. Poses lie along N as a rule, and every image is treated by itself. They
may also lie along C, where an operator treats groups of channels apart, or along a dimension that a
kernel of size one leaves alone.
"""

from collections.abc import Callable

import torch

from posegrad.graph._layouts import Facts, Move
from posegrad.graph._moves import within_last
from posegrad.jacobian import Layout

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
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A convolution, also a transposed one: groups of channels keep apart."""
    groups, padding, transposed = facts
    if arg == 2:  # the bias, [C]
        return _first_if_channels(layout)
    if layout.dim == 1:
        each = out[1] // groups
        if arg == 1 and not transposed:
            return layout.moved(0)
        if arg == 1 and layout.pattern is not None:
            stride = layout.pattern[1]
            if each % (stride * layout.count) == 0:
                return layout.patterned(each, stride)  # the same in every group
        group = _coarser(layout, each)
        dim = 1 - arg
        return None if group is None else _finer(group, inside[dim] // groups).moved(dim)
    if arg == 1 or inside[layout.dim] != out[layout.dim]:
        return None
    if layout.dim > 1 and _at(padding, layout.dim - 2):
        return None
    return layout  # the same size without padding: kernel and stride are of size one


def group_norm(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Statistics of groups of channels, image by image."""
    if arg > 0:  # scale and shift, [C]
        return _first_if_channels(layout)
    if layout.dim == 1:
        return None if _coarser(layout, out[1] // facts[0]) is None else layout
    return layout if layout.dim == 0 else None


def pooled(count: int) -> Move:
    """Pools along some last dimensions, with a kernel size for each."""

    def move(
        facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
    ) -> Layout | None:
        at = layout.dim - (len(out) - count)
        if at < 0:
            return within_last(count)(facts, arg, layout, out, inside)
        (kernel,) = facts
        return _if_kept(layout, out, inside) if _at(kernel, at) == 1 else None

    return move


def pooled_to_size(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Adaptive pools: a dimension that keeps its size is left alone."""
    return _if_kept(layout, out, inside)


def sampled(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`grid_sample`: images `[N, C, ...]` at places `[N, ..., d]`, to `[N, C, ...]`."""
    if layout.dim == 0:
        return layout
    if arg == 0:
        return layout if layout.dim == 1 else None
    return layout.moved(layout.dim - 1) if layout.dim > 1 else None


def shuffled_channels(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Channels change places."""
    return None if layout.dim == 1 else layout


def spread_channels(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`pixel_shuffle`: from `[..., C r r, H, W]` to `[..., C, H r, W r]`."""
    return _spread(_finer, _coarser, facts, layout, out)


def spread_pixels(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`pixel_unshuffle`: from `[..., C, H r, W r]` to `[..., C r r, H, W]`."""
    return _spread(_coarser, _finer, facts, layout, out)


Grain = Callable[[Layout, int], Layout | None]
"""From the layout of a dimension and a factor to the layout after each entry has become so many
neighbours, or so many neighbours have become one; None if these belong to different poses."""


def _at(values: tuple[int, ...], place: int) -> int:
    """The value for one of the last dimensions; a single value serves them all."""
    return values[place] if len(values) > 1 else values[0]


def _first_if_channels(layout: Layout) -> Layout | None:
    return layout.moved(0) if layout.dim == 1 else None


def _if_kept(layout: Layout, out: torch.Size, inside: torch.Size) -> Layout | None:
    return layout if len(inside) == len(out) and inside[layout.dim] == out[layout.dim] else None


def _spread(
    channels: Grain, pixels: Grain, facts: Facts, layout: Layout, out: torch.Size
) -> Layout | None:
    """In `[..., C, H, W]`, one grain along C, by the factor squared, and another along H and W."""
    (factor,) = facts
    if layout.dim == len(out) - 3:
        return channels(layout, factor**2)
    return pixels(layout, factor) if layout.dim > len(out) - 3 else layout


def _finer(layout: Layout, factor: int) -> Layout:
    """The layout of a dimension in which each entry has become several neighbours."""
    if layout.pattern is None:
        return layout.owned(layout.dim, layout.owners.repeat_interleave(factor))
    size, stride = layout.pattern
    return layout.patterned(size * factor, stride * factor)


def _coarser(layout: Layout, factor: int) -> Layout | None:
    """The layout of a dimension in which several neighbours have become one.

    Returns:
        None if neighbours belong to different poses.
    """
    if factor == 1:
        return layout
    if layout.pattern is None or layout.pattern[1] % factor:
        return None
    size, stride = layout.pattern
    return layout.patterned(size // factor, stride // factor)
