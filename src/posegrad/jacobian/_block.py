"""The Jacobian of one parameter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._joining import Joining
from posegrad.jacobian._kinds import Kinds, Single
from posegrad.jacobian._parts import Factors, Part, Rows, Weights
from posegrad.jacobian._products import Products
from posegrad.jacobian._projection import Projection
from posegrad.jacobian._record import record

__all__ = ["Block", "join"]


@final
@record
class Block:
    """The rows `[M, *shape]` of one parameter, as a sum over its uses.

    All uses are parts of one block, so a tied weight has the same cross terms as its gradient.

    Args:
        shape: The parameter's shape.
        dtype: Its dtype.
        device: Where the parts are.
        count: M, the number of rows.
        parts: How the rows are held; empty if nothing depends on the parameter.
        uses: How many places in one graph the rows were read at, however they are held now.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    count: int
    parts: Sequence[Part] = ()
    uses: int = 0

    @classmethod
    def of(cls, parameter: Tensor, count: int, parts: Sequence[Part]) -> Self:
        """The block of a parameter."""
        device, uses = parameter.device, len(parts)
        return cls(parameter.shape, parameter.dtype, device, count, parts, uses)

    @classmethod
    def joined(cls, blocks: Sequence[Self]) -> Self:
        """The rows of several blocks of one parameter, one after another."""
        parts: list[Part] = []
        count = 0
        for block in blocks:
            parts += [part.shifted(count) for part in block.parts]
            count += block.count
        uses = max(block.uses for block in blocks)
        return replace(blocks[0], count=count, parts=parts, uses=uses)

    def rows(self) -> Tensor:
        """`[M, *shape]`, in float32 at least."""
        if self._is_whole():
            return self.parts[0].rows()
        total = self._zeros(*self.shape)
        for part in self.parts:
            part.add_to(total)
        return total

    def matrix(self) -> Tensor:
        """`rows` as a matrix `[M, n]`."""
        return self.rows().reshape(self.count, self.shape.numel())

    def write(self, into: Tensor) -> None:
        """Writes the matrix to a tensor `[M, n]`, which may be on another device."""
        if self._is_whole() and into.device == self.device:
            self.parts[0].write(into.view(self.count, *self.shape))
        else:
            into.copy_(self.matrix())

    def combine(self, weights: Weights) -> Tensor:
        r""":math:`\sum_i w_i \partial \hat y_i / \partial \theta` for w `[M]`: `[*shape]`."""
        if not self.parts:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        total, *others = [part.combine(weights) for part in self.parts]
        for other in others:
            total = total + other
        total = total if total.dtype == self.dtype else total.to(self.dtype)
        return total if total.is_contiguous() else total.contiguous()

    def along(self, directions: Tensor) -> Tensor:
        """The rows times directions `[k, *shape]`: `[M, k]`, in float32 at least."""
        total = self._zeros(len(directions))
        for part in self.parts:
            total[part.start : part.start + part.count] += part.along(directions)
        return total

    def picked(self, index: Tensor, inner: int) -> "Block":
        """Some of the rows, by entries of the output's dimension 0 with `inner` rows each."""
        parts: list[Part] = []
        for part in self.parts:
            first = part.start // inner
            is_here = (index >= first) & (index < first + part.count // inner)
            (places,) = is_here.nonzero(as_tuple=True)
            if not len(places):
                continue
            if int(places[-1] - places[0]) + 1 != len(places):  # rows of others come in between
                parts = [Rows(self.path, 0, self.rows()).picked(index, inner)]
                break
            found = part.picked(index[places] - first, inner)
            parts.append(found.shifted(int(places[0]) * inner))
        return replace(self, count=len(index) * inner, parts=parts)

    def across(self, other: "Block", products: Products) -> Tensor | None:
        """The inner products with the rows of another block `[M, M']` without rows, or None."""
        parts = [*self.parts, *other.parts]
        whole = self._is_whole() and other._is_whole()
        if not whole or not all(isinstance(part, Factors) for part in parts):
            return None
        first, second = parts
        assert isinstance(first, Factors)
        assert isinstance(second, Factors)
        return first.across(second, products)

    def projected(self, projection: Projection) -> Tensor:
        """The rows times a random matrix, `[M, k]`, in float32 at least."""
        total = self._zeros(projection.width)
        for part in self.parts:
            found = part.projected(projection) if isinstance(part, Factors) else None
            rows = projection.of_rows(part.rows()) if found is None else found.rows()
            total[part.start : part.start + part.count] += rows.flatten(1)
        return total

    @property
    def path(self) -> str:
        """The ways its rows were read."""
        return " + ".join(dict.fromkeys(part.path for part in self.parts))

    def bytes(self) -> int:
        """The size of what it holds."""
        return sum(part.bytes() for part in self.parts)

    def dense_bytes(self) -> int:
        """The size it would have as plain rows."""
        return self.count * self.shape.numel() * self.dtype.itemsize if self.parts else 0

    def dense(self) -> "Block":
        """The block as plain rows, in the parameter's dtype."""
        return self.as_rows(self.dtype)

    def as_rows(self, dtype: torch.dtype | None = None) -> "Block":
        """The block as plain rows in a dtype; default: float32 or wider."""
        if not self.parts:
            return self
        rows = self.rows()
        return self.held_as(rows if dtype is None else rows.to(dtype))

    def held_as(self, rows: Tensor) -> "Block":
        """The block as these rows `[M, *shape]`, which are its own."""
        parts = [Rows(self.path, 0, rows)]
        return Block(self.shape, self.dtype, self.device, self.count, parts, self.uses)

    def is_plain(self) -> bool:
        """Whether nothing is left to be multiplied: plain rows, or none that depend on it."""
        return not self.parts or (self._is_whole() and isinstance(self.parts[0], Rows))

    def smaller(self) -> "Block":
        """The block as it is or as plain rows, whichever is smaller."""
        return self if self.bytes() <= self.dense_bytes() else self.dense()

    def to(self, device: torch.device | str) -> "Block":
        """The block on another device."""
        return replace(
            self, device=torch.device(device), parts=[part.to(device) for part in self.parts]
        )

    def double(self) -> "Block":
        """The block in float64."""
        return replace(self, dtype=torch.float64, parts=[part.double() for part in self.parts])

    def live(self) -> Tensor:
        """Which rows may be other than zero, `[M]`."""
        found = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        for part in self.parts:
            found[part.start : part.start + part.count] |= part.live()
        return found

    def as_one(self, joining: Joining) -> "Block":
        """The block with its uses and chunks joined where possible."""
        return replace(self, parts=joining.of(self.parts, self.count))

    def pairs(self, products: Products) -> Tensor | None:
        """The Gramian `[M, M]` without the rows, if that is cheaper."""
        return self._by(lambda part: part.pairs(products), Kinds.pairs)

    def squares(self, products: Products) -> Tensor | None:
        """The squared norms of the rows `[M]` without the rows, if that is cheaper."""
        return self._by(lambda part: part.squares(products), Kinds.squares)

    def _by(
        self, single: Single, several: Callable[[Kinds, Single], Tensor | None]
    ) -> Tensor | None:
        """A result from a single part, or from several kinds together."""
        parts = [part for part in self.parts if isinstance(part, Factors)]
        if len(parts) < len(self.parts) or any(part.count != self.count for part in parts):
            return None
        if len(parts) == 1:
            return single(parts[0])
        kinds = Kinds.of(parts)
        return None if kinds is None else several(kinds, single)

    def _zeros(self, *shape: int) -> Tensor:
        """Zeros of this shape for each row, in float32 at least."""
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        return torch.zeros(self.count, *shape, dtype=dtype, device=self.device)

    def _is_whole(self) -> bool:
        """Whether there is only one part."""
        return len(self.parts) == 1 and self.parts[0].count == self.count


def join(blocks: dict[str, Block]) -> None:
    """Joins the uses of each parameter; once, since their factors are kept joined."""
    joining = Joining()
    for name, block in list(blocks.items()):
        if len(block.parts) > 1:
            blocks[name] = block.as_one(joining)
