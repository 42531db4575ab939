"""Matrix products with a weight: linear layers, projections, weights on either side."""

from dataclasses import replace
from math import prod
from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor, Side
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import (
    Products,
    are_kept,
    as_rows,
    crossed_pairs,
    crossed_pairs_are_cheaper,
    multiplied,
    pairs_are_cheaper,
    squared_sums,
    summed_pairs,
)
from posegrad.jacobian._record import record

__all__ = ["Linear"]

_FEW, _SMALL = 16, 2**17  # with so few poses and numbers, rows take no longer than sorting does
_AS_LONG_AS = 64  # so many multiplications take as long as to pick a number by pose: read and write


@final
@record
class Linear(ClosedForm):
    r"""The weight W of :math:`Y = A W^\top`, for A `[R, d]` and Y `[R, p]`.

    .. math::
        \frac{\partial \hat y_i}{\partial W} = \sum_{r \in R_i} b_r a_r^\top, \qquad
        \langle g_i, g_j \rangle = \sum_{r \in R_i} \sum_{s \in R_j}
            (a_r \cdot a_s)(b_r \cdot b_s)

    with :math:`R_i` the rows of pose i and :math:`b_r` their cotangents. The second identity needs
    no gradient at all: with one row per pose, the Gramian is :math:`(A A^\top) \circ (B B^\top)`.

    Args:
        input: A, laid out as Y but for its last dimension.
        flipped: Whether the parameter is :math:`W^\top` `[d, p]`.
        on_left: Whether the operator was :math:`Y = W A^\top`, so that cotangents come as `[p, R]`
            and A as `[d, R]`.
        scale: A number the product was multiplied by.
    """

    input: Factor
    flipped: bool
    on_left: bool
    scale: float

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return self._features not in layout.dims

    @property
    def positions(self) -> tuple[int, ...]:
        return () if self.on_left else tuple(range(self.input.tensor.ndim - 1))

    def opened(
        self, cotangents: tuple[Tensor, ...], layout: Layout
    ) -> tuple[ClosedForm, tuple[Tensor, ...], Layout]:
        if not self.on_left:
            return self, cotangents, layout
        a = Factor.of(self.input.value.mT, self.input.beside)
        rows = replace(layout, dims=(0,)) if layout.dims else layout
        return replace(self, input=a, on_left=False), tuple(b.mT for b in cotangents), rows

    def turned(self, cotangent: Tensor) -> tuple[ClosedForm, Tensor]:
        """For a weight beside its transpose, as in tied autoencoders and in a second backward."""
        b = Factor.of(cotangent, self.input.beside)
        return replace(self, input=b, flipped=not self.flipped), self.input.value

    def vjp(self, cotangent: Tensor) -> Tensor:
        a, b = self._rows_last(self.input.like(cotangent)), self._rows_last(cotangent)
        left, right = self._sides(a, b)
        return self._scaled(left @ right)

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        weight = direction if self.flipped else direction.mT  # [d, p]
        a = self.input.like(direction)
        return self._scaled(weight.mT @ a if self.on_left else a @ weight)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        if layout.is_regular():
            return self._scaled(multiplied(*self._sides(*self._by_pose(cotangent, layout))))
        a, b = layout.in_turn(self.input.like(cotangent)), layout.in_turn(cotangent)
        inner = a.shape[1:-1].numel()  # rows of A for each row of the layout
        sizes = [size * inner for size in layout.sizes]
        left, right = self._sides(as_rows(a), as_rows(b))  # [..., R], [R, ...]
        rows = b.new_empty(layout.count, *self.shape)
        own = left.split_with_sizes(sizes, 1), right.split_with_sizes(sizes), rows.unbind()
        for first, second, row in zip(*own, strict=True):
            torch.mm(first, second, out=row)
        return self._scaled(rows)

    def write_rows(self, cotangent: Tensor, layout: Layout, into: Tensor) -> None:
        if layout.is_regular() and into.dtype == cotangent.dtype:
            torch.bmm(*self._sides(*self._by_pose(cotangent, layout)), out=into)
            self._scaled(into)
        else:
            super().write_rows(cotangent, layout, into)

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        rows = components * self._count(cotangent)
        halved = components == 1 and self.input.tensor.device.type == "cpu"
        return pairs_are_cheaper(rows, components * layout.count, *self.shape, halved=halved)

    def inner(
        self, first: Tensor, second: Tensor, layout: Layout, products: Products
    ) -> Tensor | None:
        a, alike = self.input.value, first is second
        if self.on_left:
            a, first, second = a.mT, first.mT, second.mT  # rows first
        pairs = self._scaled_twice(products.of(a, a) * products.of(first, second))  # [R, R]
        if pairs.shape[0] == layout.count and layout.pattern:
            return pairs  # one row per pose, in order

        def in_double() -> Tensor:
            x, b, c = (as_rows(tensor).double() for tensor in (a, first, second))
            return self._scaled_twice((x @ x.mT) * (b @ c.mT))

        owners = self._flat(first.shape[:-1], layout)
        return summed_pairs(pairs, owners, alike=alike, in_double=in_double)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        rows = self._count(own.cotangent.shape), other._count(its.cotangent.shape)
        numbers = own.layout.count, its.layout.count
        if not crossed_pairs_are_cheaper(rows, numbers, *self.shape):
            return None
        left, right = self._standing(own.cotangent), other._standing(its.cotangent)
        scale = self.scale * other.scale
        pairs = products.of(left[0], right[0]) * products.of(left[1], right[1])
        pairs = pairs if scale == 1 else pairs.mul_(scale)

        def lengths() -> tuple[Tensor, Tensor] | None:
            found = self.squares(*own, products), other.squares(*its, products)
            return (
                None if found[0] is None or found[1] is None else (found[0].sqrt(), found[1].sqrt())
            )

        def in_double() -> Tensor:
            (p, q), (r, s) = ([as_rows(t).double() for t in side] for side in (left, right))
            return (p @ r.mT) * (q @ s.mT) * scale

        layouts = self._owners(own), other._owners(its)
        return crossed_pairs(pairs, layouts, lengths, in_double)

    def _standing(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The factors along the parameter's dimensions: `[..., shape[0]]` and `[..., shape[1]]`."""
        sides = self.input.value, cotangent
        a, b = (side.mT for side in sides) if self.on_left else sides
        return (a, b) if self.flipped else (b, a)

    def _owners(self, side: Side) -> Layout:
        rows = side.cotangent.mT.shape if self.on_left else side.cotangent.shape
        return self._flat(rows[:-1], side.layout)

    def projected(
        self, cotangents: tuple[Tensor, ...], left: Tensor, right: Tensor
    ) -> tuple[ClosedForm, tuple[Tensor, ...]] | None:
        """As LoGra does: projects the factors, so that only gradients `[k, l]` are formed."""
        if self.on_left:
            return None
        of_input, of_cotangent = (left, right) if self.flipped else (right, left)
        a = self.input.like(left) @ of_input.mT
        shape = torch.Size([len(left), len(right)])
        form = replace(self, shape=shape, input=Factor.of(a, self.input.beside))
        return form, tuple([b.to(left.dtype) @ of_cotangent.mT for b in cotangents])

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        if layout.is_one_each and cotangent.ndim == 2:
            squares = products.squares(self.input.value) * products.squares(cotangent)
            return self._scaled_twice(squares)
        rows = self._count(cotangent.shape)
        inner = rows // max(layout.size, 1)
        if layout.is_regular() and are_kept(rows, layout.count, *self.shape):
            return None  # rows are formed once, for the weighted sum too
        if not layout.is_regular():
            if layout.count <= _FEW and layout.count * self.shape.numel() <= _SMALL:
                return None
            within = inner**2 * sum(size**2 for size in layout.sizes)
            if rows**2 <= within + _AS_LONG_AS * rows:
                gram = self.inner(cotangent, cotangent, layout, products)
                return None if gram is None else gram.diagonal()
        pays = [pairs_are_cheaper(inner * length, 1, *self.shape) for length in layout.lengths]
        if not any(pays):
            return None
        b = wide(cotangent)
        squares = b.new_zeros(layout.count)
        groups = layout.groups(self.input.like(b), b)
        for (poses, sides), by_pairs in zip(groups, pays, strict=True):
            a, b = (side.flatten(1, -2) for side in sides)  # [k, T, d], [k, T, p]
            found = squared_sums(a, b) if by_pairs else self._row_squares(a, b)
            if found is None:
                return None
            squares[poses] = found
        return self._scaled_twice(squares)

    def _row_squares(self, a: Tensor, b: Tensor) -> Tensor:
        return multiplied(b.mT, a).flatten(1).square().sum(1)

    def combine(self, cotangent: Tensor, layout: Layout, weights: Tensor) -> Tensor | None:
        """With one row per pose, the weights go to the smaller of its two factors."""
        a = self.input.like(cotangent)
        shorter = not self.on_left and a.numel() < cotangent.numel()
        if not shorter or not layout.is_one_each or cotangent.ndim != 2:
            return None
        left, right = self._sides(layout.weigh(a, weights), cotangent)
        return self._scaled(left @ right)

    @property
    def _features(self) -> int:
        """The dimension of cotangents that runs over p."""
        return 0 if self.on_left else self.input.tensor.ndim - 1

    def _count(self, cotangent: torch.Size) -> int:
        """R, the number of rows."""
        return prod(size for dim, size in enumerate(cotangent) if dim != self._features)

    def _rows_last(self, tensor: Tensor) -> Tensor:
        """`[R, features]`."""
        return tensor.mT if self.on_left else as_rows(tensor)

    def _flat(self, rows: torch.Size, layout: Layout) -> Layout:
        """The layout of `[R, features]`, in the order that `reshape` gives."""
        dims = tuple(1 - dim for dim in layout.dims) if self.on_left else layout.dims
        if dims == (0,) and layout.pattern:
            stride = layout.pattern[1] * rows[1:].numel()
            return Layout.regular(layout.count, 0, rows.numel(), stride, layout.device)
        shape = [size if dim in dims else 1 for dim, size in enumerate(rows)]
        return Layout.along(layout.count, 0, layout.owners.reshape(shape).expand(rows).reshape(-1))

    def _sides(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the gradient, from `[..., R, d]` and `[..., R, p]`."""
        return (a.mT, b) if self.flipped else (b.mT, a)

    def _by_pose(self, cotangent: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """A and B with the rows of each pose together, `[m, T, d]` and `[m, T, p]`."""
        a, b = layout.by_pose(self.input.like(cotangent)), layout.by_pose(cotangent)
        return a.flatten(1, -2), b.flatten(1, -2)

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.scale == 1 else gradient.mul_(self.scale)

    def _scaled_twice(self, products: Tensor) -> Tensor:
        return products if self.scale == 1 else products.mul_(self.scale**2)
