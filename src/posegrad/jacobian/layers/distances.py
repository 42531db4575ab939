"""Distances to points that are parameters: prototypes, centres of radial functions."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from posegrad._torch import distances_backward
from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import Products, as_rows
from posegrad.jacobian._record import record

__all__ = ["Distances"]

_SLOPES = 2**20  # numbers in the derivatives computed at a time


@final
@record
class Distances(ClosedForm):
    r"""The points C `[k, d]` of :math:`y_{rj} = \lVert c_j - x_r \rVert_p`.

    With :math:`p = 2`, and :math:`0 / 0 = 0`,

    .. math::
        \frac{\partial \hat y_i}{\partial c_j}
            = \sum_{r \in R_i} b_{rj} \frac{c_j - x_r}{y_{rj}},
        \qquad
        \lVert g_i \rVert^2 = \sum_j b_{ij}^2 \quad\text{with one row per pose.}

    Args:
        input: X, `[..., R, d]`.
        points: A copy of C, since the next step changes C.
        distances: Y, as the operator saved it.
        p: The order of the norm.
        on_left: Whether the points came first, so that Y is `[..., k, R]`.
        by_products: Whether Y was computed from products of X and C; then its backward is, too.
    """

    input: Factor
    points: Factor
    distances: Factor
    p: float
    on_left: bool
    by_products: bool

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return len(cotangent) - (2 if self.on_left else 1) not in layout.dims

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._pulled(*map(as_rows, self._standing(cotangent)))

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        x, y = (as_rows(t) for t in self._inputs(direction))
        at_once = max(1, _SLOPES // max(direction.numel(), 1))
        parts = [slice(i, i + at_once) for i in range(0, len(x), at_once)]
        moved = [(self._slopes(x[part], y[part]) * direction).sum(2) for part in parts]
        return self._turned(torch.cat(moved).reshape(self._turned(self.distances.value).shape))

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        layout = self._turned_layout(cotangent, layout)
        sides = self._standing(cotangent)
        if layout.is_regular():
            return self._pulled(*(layout.by_pose(side).flatten(1, -2) for side in sides))
        segments = zip(*(layout.segments(side) for side in sides), strict=True)
        return torch.stack([self._pulled(*map(as_rows, own)) for own in segments])

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        if self.p != 2 or self.on_left or not layout.is_one_each or cotangent.ndim != 2:
            return None
        b, x, y = self._standing(wide(cotangent))
        ratio = _ratio(b, y)
        if self.by_products:  # inexact where points are near, so Y is computed anew
            mode = "donot_use_mm_for_euclid_dist"
            y = torch.cdist(x, self.points.like(b), compute_mode=mode)
        return ratio.mul_(y).square_().sum(1)

    def _pulled(self, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`[..., k, d]`, from cotangents and distances `[..., T, k]` and from `[..., T, d]`."""
        c = self.points.like(b)
        if not self.by_products:
            return distances_backward(b.mT, c, x, self.p, y.mT)
        ratio = _ratio(b, y)
        return c * ratio.sum(-2).unsqueeze(-1) - ratio.mT @ x

    def _slopes(self, x: Tensor, y: Tensor) -> Tensor:
        """How each distance changes with its point, `[R, k, d]`."""
        return self._pulled(torch.ones_like(y).unsqueeze(1), x.unsqueeze(1), y.unsqueeze(1))

    def _standing(self, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangent, X and Y with rows before features."""
        return self._turned(cotangent), *self._inputs(cotangent)

    def _inputs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.input.like(like), self._turned(self.distances.like(like))

    def _turned(self, distances: Tensor) -> Tensor:
        return distances.mT if self.on_left else distances

    def _turned_layout(self, cotangent: Tensor, layout: Layout) -> Layout:
        """The layout of a cotangent with rows before features."""
        last = cotangent.ndim - 1
        if not self.on_left or last not in layout.dims:
            return layout
        return replace(layout, dims=(*layout.dims[:-1], last - 1))


def _ratio(b: Tensor, y: Tensor) -> Tensor:
    """Cotangents over distances; zero where the distance is, even for an infinite cotangent."""
    return (b / y).masked_fill_(y == 0, 0)
