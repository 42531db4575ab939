"""Parts of a block: how the rows of one parameter are held."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from operator import is_
from typing import Any, Self, final

import torch
from torch import Tensor

from posegrad.errors import ShapeMismatchError
from posegrad.jacobian._arrangement import Arrangement
from posegrad.jacobian._form import ClosedForm, Side
from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._precision import wide
from posegrad.jacobian._products import Products, rows_are_cheaper
from posegrad.jacobian._projection import Projection
from posegrad.jacobian._pull import Pull
from posegrad.jacobian._record import record

__all__ = [
    "Factors",
    "Part",
    "Rows",
    "Weights",
    "checked_weights",
]


_KEPT = 2  # rows are formed for a product if at most this many times larger than their factors


@record
class Part(ABC):
    """Some rows of a block, or one of several summands of them.

    Args:
        path: How the rows were read, for `report`.
        start: The number of its first row in the whole Jacobian.
    """

    path: str
    start: int

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of its rows."""

    @abstractmethod
    def rows(self) -> Tensor:
        """The rows, `[count, *shape]`."""

    def write(self, into: Tensor) -> None:
        """Writes the rows to a tensor `[count, *shape]`."""
        into.copy_(self.rows())

    @abstractmethod
    def combine(self, weights: "Weights") -> Tensor:
        """The sum of the rows times their weights: `[*shape]`."""

    @abstractmethod
    def along(self, directions: Tensor) -> Tensor:
        """The rows times directions `[k, *shape]` of the parameter: `[count, k]`."""

    @abstractmethod
    def is_live(self) -> bool:
        """Whether any row may be other than zero."""

    @abstractmethod
    def held(self) -> list[Tensor]:
        """The tensors that it holds."""

    def bytes(self) -> int:
        """The size of these tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.held())

    @abstractmethod
    def to(self, device: torch.device | str) -> "Part":
        """The part on another device."""

    @abstractmethod
    def double(self) -> "Part":
        """The part in float64."""

    @abstractmethod
    def live(self) -> Tensor:
        """Which rows may be other than zero, `[count]`."""

    @abstractmethod
    def picked(self, index: Tensor, inner: int) -> "Part":
        """Some of its rows, as a part that begins at row 0.

        Args:
            index: Entries of the output's dimension 0, counted from the part's first row.
            inner: How many rows each entry has.
        """

    def shifted(self, by: int) -> "Part":
        """The part as rows of a longer Jacobian."""
        return replace(self, start=self.start + by)

    def add_to(self, rows: Tensor) -> None:
        """Adds the rows to the block's `[M, *shape]`."""
        rows[self.start : self.start + self.count] += self.rows()


@final
@record
class Rows(Part):
    """Plain rows."""

    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def rows(self) -> Tensor:
        return wide(self.values)

    def combine(self, weights: "Weights") -> Tensor:
        return _weighted_sum(self.rows(), weights.of(self))

    def along(self, directions: Tensor) -> Tensor:
        rows = self.rows().reshape(self.count, directions[0].numel())
        return rows @ directions.reshape(len(directions), -1).to(rows.device, rows.dtype).mT

    def picked(self, index: Tensor, inner: int) -> Part:
        rows = self.values.reshape(-1, inner, *self.values.shape[1:])
        return replace(self, start=0, values=rows[index.to(rows.device)].flatten(0, 1))

    def is_live(self) -> bool:
        return bool(self.values.any())

    def held(self) -> list[Tensor]:
        return [self.values]

    def to(self, device: torch.device | str) -> Part:
        return replace(self, values=self.values.to(device))

    def double(self) -> Part:
        return replace(self, values=self.values.double())

    def live(self) -> Tensor:
        return _any_in_row(self.values)


@final
@record
class Factors(Part):
    """A closed form and its cotangents, one for each component of the output.

    Args:
        form: How the parameter enters the operator.
        layout: The owners of the cotangents' rows.
        arrangement: How poses and components number the output.
        cotangents: K tensors of one shape.
        pull: From the tensor that the form is for back to the parameter, if computed from it.
    """

    form: ClosedForm
    layout: Layout
    arrangement: Arrangement
    cotangents: tuple[Tensor, ...]
    pull: Pull | None = None

    @classmethod
    def direct(
        cls,
        form: ClosedForm,
        layout: Layout,
        arrangement: Arrangement,
        cotangents: tuple[Tensor, ...],
    ) -> Part:
        """The part of a parameter that enters directly; as rows where these are the smaller."""
        factors = cls(
            f"closed form ({type(form).__name__})", 0, form, layout, arrangement, cotangents
        )
        if form.has_small_rows and layout.dims:
            shrinks = arrangement.poses * form.shape.numel() < cotangents[0].numel()
            return factors.as_rows() if shrinks else factors
        return factors

    def as_rows(self) -> Rows:
        """The part with rows in place of factors."""
        return Rows(self.path, self.start, self.rows())

    @property
    def keeps_products(self) -> bool:
        """Whether inner products of the form's gradients equal those of the parameter's."""
        return self.pull is None or self.pull.keeps

    def opened(self) -> "Factors":
        """The part in a form that counts positions, if there is one."""
        form, cotangents, layout = self.form.opened(self.cotangents, self.layout)
        if form is self.form:
            return self
        return replace(self, form=form, cotangents=cotangents, layout=layout)

    def turned(self) -> "Factors | None":
        """The part with cotangent and factor exchanged; None if there is no single pair."""
        found = self.form.turned(self.cotangents[0]) if len(self.cotangents) == 1 else None
        return None if found is None else replace(self, form=found[0], cotangents=(found[1],))

    @property
    def count(self) -> int:
        return self.arrangement.shape.numel()

    def rows(self) -> Tensor:
        each = [self._rows(wide(b)) for b in self.cotangents]  # K of [m, *shape]
        if self.arrangement.dim is None:
            rows = each[0]
        else:
            rows = self.arrangement.join(torch.stack(each, dim=1))
        return rows if self.pull is None else wide(self.pull.back(rows))

    def write(self, into: Tensor) -> None:
        alone = self.arrangement.dim is None and self.pull is None
        if alone and self.layout.dims:
            self.form.write_rows(wide(self.cotangents[0]), self.layout, into)
        else:
            super().write(into)

    def pairs(self, products: Products) -> Tensor | None:
        """The Gramian `[M, M]` without the rows, if that is cheaper."""
        cotangents, layout = self.cotangents, self.layout
        if not self.keeps_products or not layout.dims:
            return None
        if not self.form.prefers_pairs(cotangents[0].shape, layout, len(cotangents)):
            return None
        return self._with_each(self, lambda b, c: self.form.inner(b, c, layout, products))

    def squares(self, products: Products) -> Tensor | None:
        """The squared norms of the rows `[M]` without the rows, if that is cheaper."""
        if not self.keeps_products or not self.layout.dims:
            return None
        if self.arrangement.dim is None:
            return self.form.squares(self.cotangents[0], self.layout, products)
        each = []
        for cotangent in self.cotangents:
            found = self.form.squares(cotangent, self.layout, products)
            if found is None:
                return None
            each.append(found)
        return self.arrangement.join(torch.stack(each, dim=1))

    def combine(self, weights: "Weights") -> Tensor:
        if self.arrangement.dim is None and self.pull is None:
            shorter = self.form.combine(wide(self.cotangents[0]), self.layout, weights.of(self))
            if shorter is not None:
                return shorter
        weighed = weights.times_cotangents(self)
        total = self.form.vjp(weighed)
        if total.data_ptr() == weighed.data_ptr():  # nothing was summed
            total = total.clone()  # another parameter may have the same
        return total if self.pull is None else wide(self.pull.back(total.unsqueeze(0))[0])

    def along(self, directions: Tensor) -> Tensor:
        r"""Uses the change of the operator's output, and no gradient unless that is cheaper.

        With :math:`b_r` the cotangent of row r and :math:`y_r` the change, :math:`(J v)_i` is
        :math:`\sum_{r \in R_i} b_r \cdot y_r`.
        """
        numbers = self.count * directions[0].numel()
        sums = self.form.sums(self.cotangents[0].shape)
        if rows_are_cheaper(sums, self.count, len(directions)) and numbers <= _KEPT * self.size():
            return self.as_rows().along(directions)
        moved = self._entering(directions)
        if moved is None:
            return self.as_rows().along(directions)
        return torch.stack([self._along(direction) for direction in moved], dim=1)

    def _along(self, direction: Tensor) -> Tensor:
        """The rows times one direction of the operator's argument, `[count]`."""
        cotangents = [wide(b) for b in self.cotangents]
        b = cotangents[0]
        change = self.form.jvp(direction.to(b.device, b.dtype), b.shape)
        columns = [self.layout.dots(b, change) for b in cotangents]  # K of [m]
        return self.arrangement.join(torch.stack(columns, dim=1))

    def picked(self, index: Tensor, inner: int) -> Part:
        """The factors' rows of these poses, if the form counts positions; else plain rows."""
        part = self.opened()
        dims, layout = part.form.positions, part.layout
        if not dims or not layout.dims:
            return self.as_rows().picked(index, inner)
        arrangement, poses, components = part.arrangement.picked(index.to(layout.owners.device))
        further = len(dims) - len(layout.dims)
        sizes = layout.front(part.cotangents[0]).shape[1 : 1 + further]
        chosen, rows = layout.picked(poses, dims[0], sizes.numel())

        def cut(tensor: Tensor) -> Tensor:
            return layout.front(tensor)[rows].flatten(0, further).movedim(0, dims[0])

        form = part.form.of_positions([cut(factor.value) for factor in part.form.factors()])
        cotangents = tuple([cut(part.cotangents[k]) for k in components.tolist()])
        return Factors(self.path, 0, form, chosen, arrangement, cotangents, self.pull)

    def across(self, other: "Factors", products: Products) -> Tensor | None:
        """The inner products with the rows of another part `[M, M']` without the rows, or None."""
        if type(self.form) is not type(other.form) or not self._meets(other):
            return None

        def met(b: Tensor, c: Tensor) -> Tensor | None:
            own, its = Side(b, self.layout), Side(c, other.layout)
            return self.form.across(own, other.form, its, products)

        return self._with_each(other, met)

    def _with_each(
        self, other: "Factors", met: Callable[[Tensor, Tensor], Tensor | None]
    ) -> Tensor | None:
        """Products of all components with those of another part, `[M, M']`; None if any is missing.

        Args:
            other: The part.
            met: From one cotangent of each part to the products of their poses, `[m, m']`.
        """
        grid: list[Tensor] = []
        for b, c in product(self.cotangents, other.cotangents):
            found = met(b, c)
            if found is None:
                return None
            grid.append(found)
        if self.arrangement.dim is None and other.arrangement.dim is None:
            return grid[0]
        k = len(self.cotangents)
        joined = torch.stack(grid).reshape(k, -1, *grid[0].shape)
        joined = self.arrangement.join(joined.permute(2, 0, 3, 1))  # [M, m', K']
        return other.arrangement.join(joined.permute(1, 2, 0)).mT

    def _meets(self, other: "Factors") -> bool:
        """Whether both forms are for the same tensor, with poses along dimensions."""
        if not self.layout.dims or not other.layout.dims or self.form.shape != other.form.shape:
            return False
        if self.pull is None or other.pull is None:
            return self.pull is other.pull
        device = self.cotangents[0].device
        places = self.pull.places(self.form.shape, device)
        its = other.pull.places(other.form.shape, device)
        return places is not None and its is not None and torch.equal(places, its)

    def projected(self, projection: Projection) -> "Factors | None":
        """The part of a projected parameter; None if its rows must be projected instead."""
        part = self.opened()
        if part.pull is not None or not part.layout.dims or len(part.form.shape) < 2:
            return None
        found = part.form.projected(part.cotangents, *projection.sides(part.form.shape))
        if found is None:
            return None
        form, cotangents = found
        return replace(part, form=form, cotangents=cotangents)

    def _entering(self, directions: Tensor) -> Tensor | None:
        """Directions of the parameter as those of the operator's argument; None if unknown."""
        if self.pull is None:
            return directions
        places = self.pull.places(self.form.shape, self.cotangents[0].device)
        return None if places is None else directions.flatten(1)[:, places.to(directions.device)]

    def size(self) -> int:
        """How many numbers are held."""
        return sum(tensor.numel() for tensor in self.held())

    def weighed(self, weights: Tensor) -> Tensor:
        """The cotangents times the weights `[count]` of their owners, over all components."""
        if self.arrangement.dim is None:
            return self.layout.weigh(wide(self.cotangents[0]), weights)
        columns = self.arrangement.split(weights).unbind(1)  # K of [m]
        total = self.layout.weigh(wide(self.cotangents[0]), columns[0])
        for cotangent, column in zip(self.cotangents[1:], columns[1:], strict=True):
            total += self.layout.weigh(wide(cotangent), column)
        return total

    def has_cotangents_of(self, other: "Factors") -> bool:
        """Whether the parts differ only in their forms."""
        if self.layout is not other.layout or self.start != other.start:
            return False
        return all(map(is_, self.cotangents, other.cotangents))

    def add_to(self, rows: Tensor) -> None:
        if self.layout.dims or self.pull is not None:
            return super().add_to(rows)
        owner = int(self.layout.owners)
        block = self.arrangement.split(rows[self.start : self.start + self.count])
        for k, cotangent in enumerate(self.cotangents if owner >= 0 else ()):
            block[owner, k] += self.form.vjp(wide(cotangent))
        if self.arrangement.dim not in (None, 0):  # split has copied
            rows[self.start : self.start + self.count] = self.arrangement.join(block)
        return None

    def is_live(self) -> bool:
        return any(bool(b.any()) for b in self.cotangents)

    def __copy__(self) -> Self:
        return replace(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes deep copies and pickles without the graph behind `pull`."""
        if self.pull is not None:
            return Rows, (self.path, self.start, self.rows())
        return Factors, (
            self.path, self.start, self.form, self.layout, self.arrangement, self.cotangents
        )  # fmt: skip

    def held(self) -> list[Tensor]:
        return [*(factor.tensor for factor in self.form.factors()), *self.cotangents]

    def to(self, device: torch.device | str) -> Part:
        if self.pull is not None:
            return Rows(self.path, self.start, self.rows().to(device))
        return replace(
            self,
            form=self.form.to(device),
            layout=self.layout.to(device),
            cotangents=tuple(b.to(device) for b in self.cotangents),
        )

    def double(self) -> "Factors":
        return replace(
            self, form=self.form.double(), cotangents=tuple(b.double() for b in self.cotangents)
        )

    def live(self) -> Tensor:
        owners, flags = self.layout.owners, []
        for cotangent in self.cotangents:
            rows = self.layout.front(cotangent)
            alive = _any_in_row(rows) & (owners != NOBODY)  # [R]
            own = alive.new_zeros(self.layout.count)
            own[owners[alive]] = True
            flags.append(own)
        return self.arrangement.join(torch.stack(flags, dim=1))

    def _rows(self, cotangent: Tensor) -> Tensor:
        if self.layout.dims:
            return self.form.rows(cotangent, self.layout)
        gradient = self.form.vjp(cotangent).unsqueeze(0)  # all rows belong to one pose
        if self.layout.count == 1:
            return gradient
        owner = self.layout.owners
        rows = gradient.new_zeros(self.layout.count, *gradient.shape[1:])
        return rows if int(owner) < 0 else rows.index_copy_(0, owner, gradient)


@final
class Weights:
    """Weights of the rows of a Jacobian.

    Caches the latest weighted cotangents, which a weight and its bias share.

    Args:
        values: `[M]`.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._last: tuple[Factors, Tensor] | None = None

    def of(self, part: Part) -> Tensor:
        """The weights of a part's rows, `[count]`."""
        values, count = self.values, part.count
        return values if count == values.shape[0] else values[part.start : part.start + count]

    def times_cotangents(self, part: Factors) -> Tensor:
        """The cotangents of a part, with each row times the weight of its owner."""
        if self._last is not None and part.has_cotangents_of(self._last[0]):
            return self._last[1]
        self._last = None  # freed before the next one is made
        weighed = part.weighed(self.of(part))
        self._last = part, weighed
        return weighed


def checked_weights(weights: Tensor, shape: torch.Size, of: str = "the output") -> Tensor:
    """Weights without their graph.

    Raises:
        ShapeMismatchError: if they are not one for each number of an output of this shape.
        TypeError: if they are complex.
    """
    if weights.is_complex():
        raise TypeError(
            f"The weights are {weights.dtype}, but outputs and parameters are real, and so is a "
            f"gradient.\nCombine weights.real and weights.imag, one after the other."
        )
    if weights.shape != shape:
        raise ShapeMismatchError(
            f"The weights have shape {list(weights.shape)}, {of} {list(shape)}; there must be one "
            f"weight for each of its numbers.\n"
            f"Reshape the weights, or the output before jacobian()."
        )
    return weights.detach()


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    total = weights.to(rows.device, rows.dtype) @ rows.reshape(rows.shape[0], -1)
    return total.reshape(rows.shape[1:])


def _any_in_row(rows: Tensor) -> Tensor:
    """Whether rows `[R, ...]` are other than zero, `[R]`; R may be 0."""
    return rows.flatten(1).any(1) if rows.ndim > 1 else rows != 0
