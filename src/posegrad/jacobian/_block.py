"""The Jacobian of one parameter."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Self

import torch
from torch import Tensor

from posegrad.jacobian._joining import Joining
from posegrad.jacobian._parts import Factors, Part, Rows, Weights
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record

__all__ = ["Block", "join"]


@record
class Block:
    """The rows `[M, *shape]` of one parameter, as the sum of its uses.

    All uses of a parameter are parts of one block, so a tied weight has the cross terms that its
    gradient has.

    Args:
        shape: The parameter's shape.
        dtype: Its dtype.
        device: Where the parts are.
        count: M, the number of rows.
        parts: None for a parameter that nothing depends on.
        uses: In how many places of one graph its rows were read, however they are held now.
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
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        total = torch.zeros(self.count, *self.shape, dtype=dtype, device=self.device)
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

    def bytes(self) -> int:
        """The size of what is held."""
        return sum(part.bytes() for part in self.parts)

    def dense_bytes(self) -> int:
        """The size of plain rows."""
        return self.count * self.shape.numel() * self.dtype.itemsize if self.parts else 0

    def dense(self) -> "Block":
        """The block as plain rows, in the parameter's dtype."""
        return self.as_rows(self.dtype)

    def as_rows(self, dtype: torch.dtype | None = None) -> "Block":
        """The block as plain rows, in float32 at least, or in another dtype."""
        if not self.parts:
            return self
        path = " + ".join(dict.fromkeys(part.path for part in self.parts))
        rows = self.rows()
        return replace(self, parts=[Rows(path, 0, rows if dtype is None else rows.to(dtype))])

    def smaller(self) -> "Block":
        """The block as it is or as plain rows, whichever are less."""
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
        """Which rows can be other than zero, `[M]`."""
        found = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        for part in self.parts:
            found[part.start : part.start + part.count] |= part.live()
        return found

    def as_one(self, joining: Joining) -> "Block":
        """The block with the uses and chunks joined that can be."""
        return replace(self, parts=joining.of(self.parts, self.count))

    def pairs(self, products: Products) -> Tensor | None:
        """The Gramian `[M, M]` without the rows, if that is cheaper and all uses are one."""
        part = self.parts[0] if self._is_whole() else None
        if not isinstance(part, Factors) or not part.keeps_products:
            return None
        cotangents, layout = part.cotangents, part.layout
        if not layout.dims or not part.form.prefers_pairs(
            cotangents[0].shape, layout, len(cotangents)
        ):
            return None
        if part.arrangement.dim is None:
            return part.form.inner(cotangents[0], cotangents[0], layout, products)
        pairs = product(cotangents, cotangents)
        grid = [part.form.inner(b, c, layout, products) for b, c in pairs]
        found = [one for one in grid if one is not None]  # K^2 of [m, m]
        if len(found) < len(grid):
            return None
        k = len(cotangents)
        joined = torch.stack(found).reshape(k, k, *found[0].shape)
        joined = joined.permute(2, 0, 3, 1)  # [m, K, m, K]
        joined = part.arrangement.join(joined)  # [M, m, K]
        return part.arrangement.join(joined.permute(1, 2, 0)).mT

    def squares(self, products: Products) -> Tensor | None:
        """The squared norms of the rows `[M]` without the rows, if that is cheaper."""
        part = self.parts[0] if self._is_whole() else None
        if not isinstance(part, Factors) or not part.keeps_products or not part.layout.dims:
            return None
        each = []
        for cotangent in part.cotangents:
            found = part.form.squares(cotangent, part.layout, products)
            if found is None:
                return None
            each.append(found)
        return part.arrangement.join(torch.stack(each, dim=1))

    def _is_whole(self) -> bool:
        """Whether one part is all there is."""
        return len(self.parts) == 1 and self.parts[0].count == self.count


def join(blocks: dict[str, Block]) -> None:
    """Makes one of the uses of each parameter; once, for their factors are kept so."""
    joining = Joining()
    for name, block in list(blocks.items()):
        if len(block.parts) > 1:
            blocks[name] = block.as_one(joining)
