"""Products of a batch of matrices with a batch of weights: ensembles, experts, einsum."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import (
    Products,
    pairs_are_cheaper,
    squared_sums,
    summed_pairs,
)
from posegrad.jacobian._record import record

__all__ = ["BatchedLinear"]


@final
@record
class BatchedLinear(ClosedForm):
    r"""The weights W of :math:`Y_e = A_e W_e` for each e of an ensemble; poses own rows of A and Y.

    .. math::
        \frac{\partial \hat y_i}{\partial W_e} = \sum_{r \in R_i} a_{er} b_{er}^\top, \qquad
        \langle g_i, g_j \rangle = \sum_e \sum_{r \in R_i} \sum_{s \in R_j}
            (a_{er} \cdot a_{es})(b_{er} \cdot b_{es})

    Args:
        input: A, `[E, R, d]`.
        on_left: Whether the operator was :math:`Y_e = W_e A_e`. Then poses own columns, A is
            `[E, d, R]` and Y `[E, p, R]`.
        scale: A number the product was multiplied by.
    """

    input: Factor
    on_left: bool
    scale: float

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == ((2,) if self.on_left else (1,))

    @property
    def positions(self) -> tuple[int, ...]:
        return (2,) if self.on_left else (1,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        a = self.input.value.to(cotangent.dtype)
        return self._product(*((a.mT, cotangent.mT) if self.on_left else (a, cotangent)))

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        a = self.input.like(direction)
        change = direction @ a if self.on_left else a @ direction
        return change if self.scale == 1 else change * self.scale

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        inputs = self.input.value.to(cotangent.dtype)
        if layout.is_regular():
            a, b = layout.by_pose(inputs), layout.by_pose(cotangent)  # [m, T, E, features]
            return self._product(a.transpose(1, 2), b.transpose(1, 2))
        pairs = zip(layout.segments(inputs), layout.segments(cotangent), strict=True)
        return torch.stack([self._product(a.transpose(0, 1), b.transpose(0, 1)) for a, b in pairs])

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        """As for `Linear`, for each e."""
        rows, numbers = components * layout.size, components * layout.count
        return pairs_are_cheaper(rows, numbers, *self.shape[1:])

    def inner(
        self, first: Tensor, second: Tensor, layout: Layout, products: Products
    ) -> Tensor | None:
        a, b, c = self.input.value.to(wide(first).dtype), wide(first), wide(second)
        if self.on_left:
            a, b, c = a.mT, b.mT, c.mT  # [E, R, features]
        pairs = ((a @ a.mT) * (b @ c.mT)).sum(0) * self.scale**2  # [R, R]

        def in_double() -> Tensor:
            x, y, z = a.double(), b.double(), c.double()
            return ((x @ x.mT) * (y @ z.mT)).sum(0) * self.scale**2

        owners = replace(layout, dims=(0,))
        return summed_pairs(pairs, owners, alike=first is second, in_double=in_double)

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        pays = layout.is_regular() and pairs_are_cheaper(layout.lengths[0], 1, *self.shape[1:])
        if not pays:
            return None
        b = wide(cotangent)
        a, b = (layout.by_pose(t).transpose(1, 2) for t in (self.input.like(b), b))  # [m, E, T, .]
        squares = squared_sums(a, b)
        return None if squares is None else squares * self.scale**2

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """The weights' shape, from `[..., E, R, d]` and `[..., E, R, p]`."""
        gradient = b.mT @ a if self.on_left else a.mT @ b
        return gradient if self.scale == 1 else gradient * self.scale
