"""The positions of several uses of a parameter, joined into one use."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._products import is_same

__all__ = ["Positions"]

_LATEST = 2  # joined tensors kept: neighbouring uses share that many


@final
class Positions:
    """Where the positions of several uses lie in their joint use.

    If all poses have equally many positions, they are sorted by pose; otherwise the uses are simply
    concatenated.

    Attributes:
        key: Equal for uses with the same positions.

    Args:
        layouts: The owners of each use's positions.
        starts: The number of each use's first pose.
        shapes: The shapes of the cotangents.
        dims: The dimensions of each use that count positions; the first is the same for all.
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
        """The factors or cotangents of all uses as one, with positions along `layout.dims`."""
        found = next((one for one in self._latest if all(map(_are_same, one[0], tensors))), None)
        found = (tensors, self._joined(tensors)) if found is None else found
        self._latest = [found, *(one for one in self._latest if one is not found)][:_LATEST]
        return found[1]

    @cached_property
    def layout(self) -> Layout:
        """The owners of the joined positions."""
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
        """Whether every use has one position for each pose, in the order of poses."""
        alike = {layout.is_one_each for layout in self._owned}
        return alike == {True} and {len(dims) for dims in self._dims} == {1}

    @cached_property
    def _each(self) -> int | None:
        """How many positions each pose has, if they follow a pattern and are not zero."""
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
        return numbers.pop() or None  # zero if none has any

    @cached_property
    def _spans(self) -> dict[tuple[int, int], list[int]]:
        """The uses for each range of poses."""
        spans: dict[tuple[int, int], list[int]] = {}
        for use, (start, layout) in enumerate(zip(self._starts, self._layouts, strict=True)):
            spans.setdefault((start, layout.count), []).append(use)
        return spans

    @cached_property
    def _owned(self) -> list[Layout]:
        """The layouts, all along a dimension, even where one pose owns all positions."""
        pairs = zip(self._layouts, self._sizes, strict=True)
        return [x if x.dims else _of_one(x, self._dim, sizes[0]) for x, sizes in pairs]

    @property
    def _dim(self) -> int:
        """The dimension of the joined positions."""
        return self._dims[0][0]

    def _lined_up(self, layout: Layout, dims: tuple[int, ...], tensor: Tensor) -> Tensor:
        """Positions in front: `[m, T, ...]` if they follow a pattern, else `[R, ...]`."""
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
