"""Products of each row with one of several weights: mixtures of experts."""

from functools import partial
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import Products, pairs_are_cheaper, summed_pairs
from posegrad.jacobian._record import record
from posegrad.jacobian.layers.linear import Linear

__all__ = ["GroupedLinear"]


@final
@record
class GroupedLinear(ClosedForm):
    r"""The weights W `[E, d, p]` of :math:`y_r = a_r W_{e(r)}`, rows sorted by their expert e.

    .. math::
        \frac{\partial \hat y_i}{\partial W_e} = \sum_{r \in R_i,\, e(r) = e} a_r b_r^\top

    This is the gradient of a linear layer whose poses are the pairs (i, e).

    Args:
        input: A, `[R, d]`.
        ends: Where the rows of each expert end, `[E]`. Rows behind the last end belong to none.
    """

    input: Factor
    ends: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        everyone = torch.zeros(len(cotangent), dtype=torch.long, device=cotangent.device)
        return self.rows(cotangent, Layout.along(1, 0, everyone))[0]

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        a = self.input.like(direction)
        change, start = a.new_zeros(len(a), self.shape[2]), 0
        for weight, stop in zip(direction, self.ends.value.tolist(), strict=True):
            change[start:stop] = a[start:stop] @ weight
            start = stop
        return change

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        rows = self._linear.rows(cotangent, self._by_expert(layout))
        return rows.reshape(layout.count, *self.shape)

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        found = self._linear.squares(cotangent, self._by_expert(layout), products)
        return None if found is None else found.reshape(layout.count, -1).sum(1)

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        """As for `Linear`, but with fewer rows, since only those of one expert are multiplied."""
        experts, d, p = self.shape
        rows = int(components * layout.size / experts**0.5)
        return pairs_are_cheaper(rows, components * layout.count, experts * d, p)

    def inner(
        self, first: Tensor, second: Tensor, layout: Layout, products: Products
    ) -> Tensor | None:
        a, b, c = self.input.like(wide(first)), wide(first), wide(second)
        total, start = b.new_zeros(layout.count, layout.count), 0
        for stop in self.ends.value.tolist():
            sides = a[start:stop], b[start:stop], c[start:stop]
            owners = Layout.along(layout.count, 0, layout.owners[start:stop])
            again = partial(_pairs_in_double, *sides)
            pairs = _pairs(*sides)
            found = summed_pairs(pairs, owners, alike=first is second, in_double=again)
            if found is None:
                return None
            total, start = total + found, stop
        return total

    @property
    def _linear(self) -> Linear:
        """The form of one expert's weight."""
        return Linear(self.shape[1:], self.input, flipped=True, on_left=False, scale=1.0)

    def _by_expert(self, layout: Layout) -> Layout:
        """The layout in which every pair of a pose and an expert counts as a pose, m E in all."""
        owners, ends = layout.owners, self.ends.value.long()
        places = torch.arange(len(owners), device=owners.device)
        experts = torch.searchsorted(ends, places, right=True)
        nobody = (owners == NOBODY) | (experts == len(ends))
        pairs = (owners * len(ends) + experts).masked_fill(nobody, NOBODY)
        return Layout.along(layout.count * len(ends), 0, pairs)


def _pairs(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a @ a.mT) * (b @ c.mT)


def _pairs_in_double(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _pairs(a.double(), b.double(), c.double())
