"""Forms that are linear in each of two inputs."""

from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor, Side
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record

__all__ = ["Bilinear"]


@final
@record
class Bilinear(ClosedForm):
    r"""The weights W `[p, d, e]` of :math:`y_{rk} = \sum_{ij} x_{ri} W_{kij} z_{rj}`.

    .. math::
        \frac{\partial \hat y_i}{\partial W} = \sum_{r \in R_i} b_r \otimes x_r \otimes z_r, \qquad
        \langle g_i, g_j \rangle = \sum_{r \in R_i} \sum_{s \in R_j}
            (b_r \cdot b_s)(x_r \cdot x_s)(z_r \cdot z_s)

    Args:
        first: x, `[R, d]`.
        second: z, `[R, e]`.
    """

    first: Factor
    second: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    @property
    def positions(self) -> tuple[int, ...]:
        return (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._of(cotangent, *self._inputs(cotangent))

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        x, z = self._inputs(direction)
        met = torch.einsum("pde,re->rpd", direction, z)
        return (met @ x.unsqueeze(2)).squeeze(2)  # [R, p]

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        segments = [layout.segments(t) for t in (cotangent, *self._inputs(cotangent))]
        return torch.stack([self._of(*parts) for parts in zip(*segments, strict=True)])

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        """With one row per pose."""
        return layout.size == layout.count and layout.pattern is not None

    def inner(self, first: Tensor, second: Tensor, layout: Layout, products: Products) -> Tensor:
        x, z = self._inputs(first)
        return products.of(first, second) * products.of(x, x) * products.of(z, z)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        sides = (self, own), (other, its)
        if not all(form.prefers_pairs(b.shape, layout, 1) for form, (b, layout) in sides):
            return None
        return (
            products.of(own.cotangent, its.cotangent)
            * products.of(self.first.value, other.first.value)
            * products.of(self.second.value, other.second.value)
        )

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        if not self.prefers_pairs(cotangent.shape, layout, 1):
            return None
        x, z = self._inputs(cotangent)
        return products.squares(cotangent) * products.squares(x) * products.squares(z)

    def _inputs(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return self.first.value.to(cotangent.dtype), self.second.value.to(cotangent.dtype)

    def _of(self, b: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """`[p, d, e]`, from `[R, p]`, `[R, d]` and `[R, e]`."""
        beside = (b.unsqueeze(2) * x.unsqueeze(1)).flatten(1)  # [R, p d]
        return (beside.mT @ z).reshape(self.shape)
