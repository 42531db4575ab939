"""The Jacobian of one parameter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import torch
from torch import Tensor

from posegrad.jacobian._parts import Factors, Part, Rows
from posegrad.jacobian._precision import wide
from posegrad.jacobian.layers.linear import Linear

__all__ = ["Block"]


@dataclass(frozen=True)
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
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    count: int
    parts: Sequence[Part] = ()

    @classmethod
    def of(cls, parameter: Tensor, count: int, parts: Sequence[Part]) -> Self:
        """The block of a parameter."""
        return cls(parameter.shape, parameter.dtype, parameter.device, count, parts)

    @classmethod
    def joined(cls, blocks: Sequence[Self]) -> Self:
        """The rows of several blocks of one parameter, one after another."""
        parts: list[Part] = []
        count = 0
        for block in blocks:
            parts += [part.shifted(count) for part in block.parts]
            count += block.count
        return replace(blocks[0], count=count, parts=parts)

    def rows(self) -> Tensor:
        """`[M, *shape]`, in float32 at least."""
        if len(self.parts) == 1 and self.parts[0].count == self.count:
            return self.parts[0].rows()
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        total = torch.zeros(self.count, *self.shape, dtype=dtype, device=self.device)
        for part in self.parts:
            part.add_to(total)
        return total

    def matrix(self) -> Tensor:
        """`rows` as a matrix `[M, n]`."""
        return self.rows().reshape(self.count, self.shape.numel())

    def combine(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_i w_i \partial \hat y_i / \partial \theta` for w `[M]`: `[*shape]`."""
        weights = weights.to(self.device)
        total = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
        for n, part in enumerate(self.parts):
            gradient = part.combine(weights[part.start : part.start + part.count])
            total = gradient if n == 0 else total + gradient
        return total.to(self.dtype).contiguous()

    def gramian(self, dtype: torch.dtype) -> Tensor:
        """The inner products of the rows, `[M, M]`, by the cheaper of two ways."""
        uses = self._linear_uses()
        if uses and self._pairs_cost(uses) <= self._rows_cost(uses):
            return self._paired(uses, dtype)
        rows = self.matrix().to(dtype)
        return rows @ rows.mT

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """The squared norm of every row, `[M]`."""
        uses = self._linear_uses()
        if uses and self._pairs_cost(uses) <= self._rows_cost(uses):
            return self._paired(uses, dtype).diagonal()
        return self.matrix().to(dtype).square().sum(1)

    def bytes(self) -> int:
        """The size of what is held."""
        return sum(part.bytes() for part in self.parts)

    def dense_bytes(self) -> int:
        """The size of plain rows."""
        return self.count * self.shape.numel() * self.dtype.itemsize if self.parts else 0

    def dense(self) -> "Block":
        """The block as plain rows, in the parameter's dtype."""
        if not self.parts:
            return self
        path = " + ".join(dict.fromkeys(part.path for part in self.parts))
        return replace(self, parts=[Rows(path, 0, self.rows().to(self.dtype))])

    def to(self, device: torch.device | str) -> "Block":
        """The block on another device."""
        return replace(
            self, device=torch.device(device), parts=[part.to(device) for part in self.parts]
        )

    def _linear_uses(self) -> list[tuple[Factors, Linear]]:
        """All parts, if they are products with one and the same matrix."""
        uses = [
            (part, part.form)
            for part in self.parts
            if isinstance(part, Factors) and isinstance(part.form, Linear) and part.pull is None
        ]
        alike = len({form.flipped for _, form in uses}) == 1
        return uses if alike and len(uses) == len(self.parts) else []

    def _pairs_cost(self, uses: list[tuple[Factors, Linear]]) -> int:
        """Multiplications of the pairwise form: R^2 (d + p)."""
        rows = sum(form.inner_cost(b)[0] for part, form in uses for b in part.cotangents)
        return rows * rows * sum(self.shape)

    def _rows_cost(self, uses: list[tuple[Factors, Linear]]) -> int:
        """Multiplications of forming all rows and their products: R d p + M^2 d p."""
        rows = sum(form.inner_cost(b)[0] for part, form in uses for b in part.cotangents)
        return (rows + self.count**2) * self.shape.numel()

    def _paired(self, uses: list[tuple[Factors, Linear]], dtype: torch.dtype) -> Tensor:
        total = torch.zeros(self.count, self.count, dtype=dtype, device=self.device)
        for (one, first), (two, second) in product(uses, uses):
            grid = torch.stack(
                [
                    torch.stack(
                        [
                            first.inner(wide(b), one.layout, second, wide(c), two.layout)
                            for c in two.cotangents
                        ],
                        dim=-1,
                    )
                    for b in one.cotangents
                ],
                dim=1,
            )  # [m, K, m', K']
            joined = one.arrangement.join(grid)  # [M, m', K']
            joined = two.arrangement.join(joined.permute(1, 2, 0)).mT  # [M, M']
            rows = slice(one.start, one.start + one.count)
            columns = slice(two.start, two.start + two.count)
            total[rows, columns] += joined
        return total
