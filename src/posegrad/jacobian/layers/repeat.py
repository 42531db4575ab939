"""Parameters that are repeated, as instance normalisation does for every image."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._record import record

__all__ = ["Repeat"]


@final
@record
class Repeat(ClosedForm):
    """A parameter whose copies follow one another: `y = theta.repeat(...)`.

    Args:
        repeats: How many copies lie along each dimension of y, which may have more dimensions than
            the parameter.
    """

    repeats: tuple[int, ...]

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        """Whether every copy along the dimension of poses belongs to one pose."""
        if len(layout.dims) != 1:
            return False
        size = self._sizes[layout.dims[0]]
        return size == 1 or (layout.stride is not None and layout.stride % size == 0)

    def vjp(self, cotangent: Tensor) -> Tensor:
        copies = range(0, 2 * len(self.repeats), 2)
        return self._grid(cotangent).sum(tuple(copies)).reshape(self.shape)

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        return direction.repeat(self.repeats)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        (dim,) = layout.dims
        others = [d for d in range(0, 2 * len(self.repeats), 2) if d != 2 * dim]
        grid = self._grid(cotangent)
        copies = (grid.sum(others, keepdim=True) if others else grid).movedim(2 * dim, 0)
        return self._owners(layout, len(copies)).sum(copies).reshape(layout.count, *self.shape)

    def _owners(self, layout: Layout, copies: int) -> Layout:
        """The owners of the copies along the dimension of poses."""
        size = self._sizes[layout.dims[0]]
        if size == 1:
            return replace(layout, dims=(0,))
        assert layout.stride is not None
        return Layout.regular(layout.count, 0, copies, layout.stride // size, layout.device)

    @property
    def _sizes(self) -> list[int]:
        """The parameter's sizes, with a 1 for each dimension that only y has."""
        return [1] * (len(self.repeats) - len(self.shape)) + list(self.shape)

    def _grid(self, cotangent: Tensor) -> Tensor:
        """`[copies, size, copies, size, ...]`."""
        pairs = zip(self.repeats, self._sizes, strict=True)
        return cotangent.reshape([number for pair in pairs for number in pair])
