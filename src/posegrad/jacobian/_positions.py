"""The positions of several uses, one after another."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._products import is_same

__all__ = ["Positions"]

_LATEST = 2  # layouts that are remembered: neighbouring uses share theirs


@final
class Positions:
    """Several uses of a parameter as one: where the positions of each lie in it.

    If all poses have equally many positions, they are sorted by pose. Else the uses follow one
    another as they are.

    Attributes:
        key: Equal for uses with the same positions.

    Args:
        layouts: Whose the positions of each use are.
        starts: The number of the first pose of each.
        shapes: Those of the cotangents.
        dims: The dimensions that count positions, of each; the first of them is the same.
        count: How many poses there are.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        starts: Sequence[int],
        shapes: Iterable[torch.Size],
        dims: Sequence[tuple[int, ...]],
        count: int,
    ) -> None:
        self._layouts, self._starts, self._dims, self._count = layouts, starts, dims, count
        pairs = zip(shapes, dims, strict=True)
        self._sizes = [tuple([shape[dim] for dim in own]) for shape, own in pairs]
        owners = [(own.count, own.dims, own.pattern or id(own.stated)) for own in layouts]
        self.key = owners, starts, self._sizes, dims, count
        self._latest: list[tuple[Sequence[Tensor], Tensor]] = []

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Factors or cotangents of all uses as one, with the positions along `layout.dims`."""
        found = next((one for one in self._latest if all(map(_are_same, one[0], tensors))), None)
        found = (tensors, self._joined(tensors)) if found is None else found
        self._latest = [found, *(one for one in self._latest if one is not found)][:_LATEST]
        return found[1]

    @cached_property
    def layout(self) -> Layout:
        """Whose the positions are."""
        dim, each = self._dim, self._each
        if each is not None:
            device = self._layouts[0].device
            return Layout.regular(self._count, dim, self._count * each, each, device)
        owners = []
        for layout, start, sizes in zip(self._owned, self._starts, self._sizes, strict=True):
            own = layout.owners
            own = torch.where(own == NOBODY, own, own + start) if start else own
            owners.append(own.repeat_interleave(prod(sizes) // max(len(own), 1)))
        return Layout.along(self._count, dim, torch.cat(owners))

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        lined_up = list(map(self._lined_up, self._owned, self._dims, tensors))
        if self._each is None:
            joined = torch.cat(lined_up)
        else:
            beside = torch.stack if self._is_one_each else torch.cat
            spans = [
                beside([lined_up[use] for use in uses], dim=1) for uses in self._spans.values()
            ]
            joined = (torch.cat(spans) if len(spans) > 1 else spans[0]).flatten(0, 1)
        return joined.movedim(0, self._dim) if self._dim else joined

    @cached_property
    def _is_one_each(self) -> bool:
        """Whether every use has one position a pose, in the order of poses."""
        alike = {layout.is_one_each for layout in self._owned}
        return alike == {True} and {len(dims) for dims in self._dims} == {1}

    @cached_property
    def _each(self) -> int | None:
        """How many positions each pose has, if they follow a pattern and it has some."""
        if not all(layout.is_regular() for layout in self._owned):
            return None
        end, numbers = 0, set()
        for (start, count), uses in self._spans.items():
            if start != end:
                return None
            end += count
            numbers.add(sum(prod(self._sizes[use]) for use in uses) // count)
        if end != self._count or len(numbers) > 1:
            return None
        return numbers.pop() or None  # none has any

    @cached_property
    def _spans(self) -> dict[tuple[int, int], list[int]]:
        """The uses of each range of poses."""
        spans: dict[tuple[int, int], list[int]] = {}
        for use, (start, layout) in enumerate(zip(self._starts, self._layouts, strict=True)):
            spans.setdefault((start, layout.count), []).append(use)
        return spans

    @cached_property
    def _owned(self) -> list[Layout]:
        """The layouts, along a dimension also where all positions belong to one pose."""
        pairs = zip(self._layouts, self._sizes, strict=True)
        return [x if x.dims else _of_one(x, self._dim, sizes[0]) for x, sizes in pairs]

    @property
    def _dim(self) -> int:
        """Where the positions are in the end."""
        return self._dims[0][0]

    def _lined_up(self, layout: Layout, dims: tuple[int, ...], tensor: Tensor) -> Tensor:
        """The positions in front: `[m, T, ...]` if they follow a pattern, else `[R, ...]`."""
        inner = len(dims) - len(layout.dims)
        if self._each is None:
            return layout.front(tensor).flatten(0, inner)
        if self._is_one_each:
            return tensor
        return layout.by_pose(tensor).flatten(1, 1 + inner)


def _are_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and is_same(one, other)


def _of_one(layout: Layout, dim: int, size: int) -> Layout:
    owners = layout.owners
    if layout.count == 1 and int(owners) == 0:
        return Layout.regular(1, dim, size, max(size, 1), owners.device)
    return Layout.along(layout.count, dim, owners.expand(size))
