"""Operators that put tensors together along the poses, or cut them out.

Examples are losses that are stacked, two half batches that are concatenated, one pose taken out of
a batch. What is cut out belongs to the poses it was cut from; a tensor of only one pose belongs to
it as a whole.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import saved
from posegrad.graph._layouts import dim_of
from posegrad.jacobian import NOBODY, WHOLE, Layout

__all__ = ["Cut", "CutMove", "joined", "parted", "piled", "sliced", "taken", "unbound"]

Sizes = tuple[int, ...]


@final
class Cut(NamedTuple):
    """One output and one argument of such an operator.

    Args:
        node: The operator.
        dim: The dimension along which it joins or cuts, counted from 0.
        argument: The number of the argument.
        output: The number of the output, whose poses are known.
        arguments: The sizes of each argument; None for one without a graph.
        outputs: The sizes of each output.
    """

    node: Node
    dim: int
    argument: int
    output: int
    arguments: Sequence[Sizes | None]
    outputs: tuple[Sizes, ...]

    @property
    def size(self) -> int:
        """The size of the argument along that dimension."""
        own = self.arguments[self.argument]
        assert own is not None
        return own[self.dim]


CutMove = Callable[[Cut, Layout], tuple[Layout | None, bool]]
"""From a cut and the layout of its output to the layout of its argument, and whether the structure
alone tells it."""


def piled(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`torch.stack`: each argument becomes one entry of the new dimension."""
    return layout if layout.is_whole else _entry(layout, cut.argument), True


def joined(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`torch.cat`: each argument becomes some entries of the dimension."""
    if layout.is_whole:
        return layout, True
    (out,) = cut.outputs
    before = cut.arguments[: cut.argument]
    if any(sizes is not None and len(sizes) < len(out) for sizes in cut.arguments):
        return None, True  # torch lets tensors of shape [0] stand beside any others
    # The sizes of constants are unknown, so we count from a side that has none, if there is one.
    if None not in before:
        start = sum(sizes[cut.dim] for sizes in before if sizes is not None)
    elif None not in (behind := cut.arguments[cut.argument :]):
        start = out[cut.dim] - sum(sizes[cut.dim] for sizes in behind if sizes is not None)
    else:
        return None, True
    return _part(layout, start, start + cut.size), True


def parted(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`torch.split`: the argument has the entries of all outputs, one after another."""
    start = sum(sizes[cut.dim] for sizes in cut.outputs[: cut.output])
    stop = start + cut.outputs[cut.output][cut.dim]
    return _within(cut, layout, slice(start, stop)), True


def unbound(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`torch.unbind`: each output is one entry of the argument."""
    return _within(cut, layout, slice(cut.output, cut.output + 1)), True


def taken(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`x[i]`: one entry of the argument, by number."""
    place = dim_of(saved(cut.node, "index"), cut.size)
    return _within(cut, layout, slice(place, place + 1)), False


def sliced(cut: Cut, layout: Layout) -> tuple[Layout | None, bool]:
    """`x[start:stop:step]`: some entries of the argument, by number."""
    given = [saved(cut.node, name) for name in ("start", "end", "step")]
    places = slice(*(None if value is None else dim_of(value, cut.size) for value in given))
    if len(range(cut.size)[places]) != cut.outputs[0][cut.dim]:
        return None, False
    return _within(cut, layout, places), False


def _part(layout: Layout, start: int, stop: int) -> Layout:
    """The layout of entries that are cut out along its dimension."""
    return layout.owned(layout.dim, _owners(layout)[start:stop])


def _entry(layout: Layout, place: int) -> Layout:
    """The layout of one entry by itself: it belongs to one pose as a whole."""
    return layout.owned(WHOLE, _owners(layout)[place : place + 1])


def _within(cut: Cut, layout: Layout, places: slice) -> Layout:
    """The layout of a tensor from which these entries were cut; the rest of it is nobody's."""
    owners = torch.full((cut.size,), NOBODY, device="cpu")
    owners[places] = _owners(layout)
    return layout.owned(cut.dim, owners)


def _owners(layout: Layout) -> Tensor:
    return layout.to("cpu").owners
