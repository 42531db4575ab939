"""A tensor of the forward that an output is differentiated by, as by a parameter."""

from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Side
from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record

__all__ = ["Activation"]


@final
@record
class Activation(ClosedForm):
    r"""The tensor H itself, whose gradient is its cotangent.

    The gradient of pose i is the cotangent's rows :math:`R_i`, and zero elsewhere. No two poses
    have a row in common, so the Gramian is diagonal, and no gradient is formed for it.
    """

    def vjp(self, cotangent: Tensor) -> Tensor:
        return cotangent

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        return direction

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        return torch.stack([layout.only(cotangent, pose) for pose in range(layout.count)])

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        return True

    def inner(self, first: Tensor, second: Tensor, layout: Layout, products: Products) -> Tensor:
        return torch.diag(layout.dots(first, second))

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor:
        return layout.dots(cotangent, cotangent)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        """Multiplies only rows that lie in the same place: R products, each with two owners."""
        if self.shape != other.shape or own.layout.dims != its.layout.dims:
            return None
        left, right = own.layout.front(own.cotangent), its.layout.front(its.cotangent)
        found = (left * right).reshape(len(left), -1).sum(1)
        first, second = own.layout.owners, its.layout.owners
        both = (first != NOBODY) & (second != NOBODY)
        total = found.new_zeros(own.layout.count, its.layout.count)
        return total.index_put_((first[both], second[both]), found[both], accumulate=True)
