"""Lookup tables."""

from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor, Side
from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record
from posegrad.jacobian.layers.linear import Linear

__all__ = ["Embedding", "EmbeddingBag"]


@record
class Table(ClosedForm):
    """A table `[V, ...]`: cotangents are added up where their indices point.

    Args:
        padding: An index that gets no gradient, or None.
    """

    padding: int | None

    def _added(self, indices: Tensor, entries: Tensor, owners: Tensor, count: int) -> Tensor:
        """`[count, *shape]`, from indices and owners `[N]` and entries `[N, ...]`."""
        height = self.shape[0]
        entries = entries.reshape(len(indices), self.shape[1:].numel())
        if self.padding is not None:
            entries = entries.masked_fill((indices == self.padding).unsqueeze(1), 0)
        table = entries.new_zeros(count * height, entries.shape[1])
        places = owners.clamp(min=0) * height + indices % height
        return table.index_add_(0, places, entries).reshape(count, *self.shape)

    def _picked(self, direction: Tensor, indices: Tensor) -> Tensor:
        """The rows of a direction `[V, ...]` that were looked up, `[*indices.shape, ...]`."""
        rows = direction[indices]
        if self.padding is None:
            return rows
        beside = (indices == self.padding).reshape(*indices.shape, *[1] * (direction.ndim - 1))
        return rows.masked_fill_(beside, 0)

    def _meet(self, indices: Tensor, count: int, components: int) -> bool:
        """Whether the products of entries in the same row are fewer than the rows of the tables."""
        if self.padding is not None:
            indices = indices[indices != self.padding]
        times = torch.bincount(indices % self.shape[0])
        return components * int(times.square().sum()) <= count * self.shape[0]

    def _sums(
        self, indices: Tensor, sides: Sequence[Tensor], owners: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The rows of the poses' tables that were looked up, but for padding; all others are zero.

        Args:
            indices: What was looked up, `[N]`.
            sides: Cotangents of the look-ups, `[N, ...]`, one tensor or several.
            owners: The pose of each look-up, `[N]`.

        Returns:
            Their indices and owners, `[U]`, sorted by owner; for each of the sides the rows,
            `[U, d]`, summed over look-ups.
        """
        live, width = owners != NOBODY, self.shape[1:].numel()
        if self.padding is not None:
            live &= indices != self.padding
        entries = [wide(side.reshape(len(live), width)) for side in sides]
        if not bool(live.all()):
            owners, indices, *entries = (each[live] for each in (owners, indices, *entries))
        height = self.shape[0]
        keys, places = torch.unique(owners * height + indices % height, return_inverse=True)
        sums = [each.new_zeros(len(keys), width).index_add_(0, places, each) for each in entries]
        return keys % height, keys.div(height, rounding_mode="floor"), sums

    def _squares(
        self, indices: Tensor, entries: Tensor, owners: Tensor, count: int
    ) -> Tensor | None:
        """The squared norms of tables; None if there are more entries than rows of tables."""
        if len(indices) > count * self.shape[0]:
            return None
        _, owners, (sums,) = self._sums(indices, [entries], owners)
        return sums.new_zeros(count).index_add_(0, owners, sums.square().sum(1))

    def _inner(
        self, indices: Tensor, sides: Sequence[Tensor], owners: Tensor, count: int
    ) -> Tensor:
        r"""The inner products of tables with others, or with themselves if there is one side.

        They are made of the entries that lie in the same row.

        .. math:: \langle g_i, g_j \rangle = \sum_{r \in R_i,\, s \in R_j} [v_r = v_s]\,
            b_r \cdot b_s

        Sorted by index, the entries of one index lie together; each is multiplied with all of them.
        """
        indices, owners, sums = self._sums(indices, sides, owners)
        order = torch.argsort(indices)
        ordered = [side[order] for side in sums]
        owners, times = owners[order], torch.bincount(indices, minlength=1)
        start, times = (t[indices[order]] for t in (times.cumsum(0) - times, times))  # [U]
        left = torch.arange(len(order), device=order.device).repeat_interleave(times)  # [pairs]
        turn = torch.arange(len(left), device=order.device) - (times.cumsum(0) - times)[left]
        right = start[left] + turn
        values = (ordered[0][left] * ordered[-1][right]).sum(1)
        places = owners[left] * count + owners[right]
        return values.new_zeros(count * count).index_add_(0, places, values).reshape(count, count)

    def _crossed(
        self, own: tuple[Tensor, Tensor, Tensor], its: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inner products of entries that lie in the same row of the table.

        Args:
            own: Indices, owners and values of the entries of one table, each `[U, ...]`.
            its: Those of the other.

        Returns:
            For each pair of such entries, the owner of either and the product.
        """
        indices, owners, sums = own
        order = torch.argsort(its[0])
        others = its[0][order]
        start = torch.searchsorted(others, indices)
        times = torch.searchsorted(others, indices, right=True) - start
        left = torch.arange(len(indices), device=indices.device).repeat_interleave(times)
        turn = torch.arange(len(left), device=indices.device) - (times.cumsum(0) - times)[left]
        right = order[start[left] + turn]
        return owners[left], its[1][right], (sums[left] * its[2][right]).sum(1)


@final
@record
class Embedding(Table):
    """A table whose rows were looked up.

    Args:
        indices: The rows, of any shape.
    """

    indices: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return all(dim < self.indices.tensor.ndim for dim in layout.dims)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(range(self.indices.tensor.ndim))

    def vjp(self, cotangent: Tensor) -> Tensor:
        indices = self.indices.value.reshape(-1)
        return self._added(indices, cotangent, torch.zeros_like(indices), 1)[0]

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        return self._picked(direction, self.indices.value)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        indices, owners = self.looked_up(layout)
        return self._added(indices, layout.front(cotangent), owners, layout.count)

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        return self._meet(self.indices.value.reshape(-1), layout.count, components)

    def inner(self, first: Tensor, second: Tensor, layout: Layout, products: Products) -> Tensor:
        indices, owners = self.looked_up(layout)
        sides = [first] if first is second else [first, second]
        return self._inner(indices, [*map(layout.front, sides)], owners, layout.count)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        sides = (self, own), (other, its)
        count, others, height = own.layout.count, its.layout.count, self.shape[0]
        looked_up = [form.indices.value.reshape(-1) % height for form, _ in sides]
        times = [torch.bincount(indices, minlength=height) for indices in looked_up]
        if int((times[0] * times[1]).sum()) > (count + others) * height:
            return None
        met = [form._entries_of(*side) for form, side in sides]
        left, right, values = self._crossed(*met)
        total = values.new_zeros(count * others)
        return total.index_add_(0, left * others + right, values).reshape(count, others)

    def projected(
        self, cotangents: tuple[Tensor, ...], left: Tensor, right: Tensor
    ) -> tuple[ClosedForm, tuple[Tensor, ...]]:
        """As a linear layer's weight on one-hot vectors; projected, these are columns of `left`."""
        indices = self.indices.value
        picked = self._picked(left.mT, indices)  # [..., k]
        input, shape = Factor.of(picked, self.indices.beside), torch.Size([len(left), len(right)])
        entries = [b.flatten(indices.ndim).to(right.dtype) @ right.mT for b in cotangents]
        return Linear(shape, input, flipped=True, on_left=False, scale=1.0), tuple(entries)

    def _entries_of(self, cotangent: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of the poses' tables that are not zero: indices, owners, values."""
        indices, owners = self.looked_up(layout)
        indices, owners, (sums,) = self._sums(indices, [layout.front(cotangent)], owners)
        return indices, owners, sums

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        indices, owners = self.looked_up(layout)
        return self._squares(indices, layout.front(cotangent), owners, layout.count)

    def looked_up(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The indices and their owners, `[R]`."""
        indices = layout.front(self.indices.value)  # [rows, ...]
        owners = layout.owners.reshape(-1, *[1] * (indices.ndim - 1)).expand_as(indices)
        return indices.reshape(-1), owners.reshape(-1)


@final
@record
class EmbeddingBag(Table):
    """A table whose rows were looked up and summed bag by bag.

    Args:
        indices: The rows, `[N]`.
        bags: The bag each went into, `[N]`.
        scale: What each was multiplied by, `[N]`.
    """

    indices: Factor
    bags: Factor
    scale: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        indices = self.indices.value
        return self._added(indices, self._entries(cotangent), torch.zeros_like(indices), 1)[0]

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        entries = self._picked(direction, self.indices.value)
        entries *= self.scale.like(entries).unsqueeze(1)
        bags = entries.new_zeros(shape)
        return bags.index_add_(0, self.bags.value, entries)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        owners = layout.owners[self.bags.value]
        return self._added(self.indices.value, self._entries(cotangent), owners, layout.count)

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        return self._meet(self.indices.value, layout.count, components)

    def inner(self, first: Tensor, second: Tensor, layout: Layout, products: Products) -> Tensor:
        owners = layout.owners[self.bags.value]
        sides = [first] if first is second else [first, second]
        return self._inner(self.indices.value, [*map(self._entries, sides)], owners, layout.count)

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        owners = layout.owners[self.bags.value]
        return self._squares(self.indices.value, self._entries(cotangent), owners, layout.count)

    def opened(
        self, cotangents: tuple[Tensor, ...], layout: Layout
    ) -> tuple[ClosedForm, tuple[Tensor, ...], Layout]:
        """The same use as a plain lookup: every row that was looked up has its own cotangent."""
        owners = layout.owners.expand(len(cotangents[0]))[self.bags.value]
        entries = tuple(map(self._entries, cotangents))
        form = Embedding(self.shape, self.padding, self.indices)
        return form, entries, Layout.along(layout.count, 0, owners)

    def _entries(self, cotangent: Tensor) -> Tensor:
        """The cotangent of every row that was looked up, `[N, d]`."""
        return cotangent[self.bags.value] * self.scale.value.to(cotangent.dtype).unsqueeze(1)
