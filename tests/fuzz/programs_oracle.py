"""What plain autograd says, row by row and parameter by parameter, and how near is near enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Rows", "Tolerance", "row_norms"]


@dataclass(frozen=True)
class Tolerance:
    """How far a row may be off: relative to itself, to its parameter's part and to the whole."""

    own: float
    whole: float
    unit: float  # the relative change of all numbers by which the conditioning is measured
    smallest: float  # norms between which squares of rows are numbers
    largest: float
    least: float  # below it numbers lose digits
    times: float  # how many times what such a change does to a row may be missed by

    @classmethod
    def of(cls, single: bool) -> Self:
        if single:
            return cls(1e-3, 1e-5, 2.0**-22, 1e-14, 1e14, 1e-36, 30.0)
        return cls(1e-7, 1e-13, 2.0**-50, 1e-140, 1e140, 1e-300, 1e3)


@dataclass(frozen=True)
class Rows:
    """The rows of an output, `[M, n]` for each parameter, in float64.

    Args:
        blocks: By parameter.
        unused: The parameters that autograd gives no gradient at all.
        residue: How far one backward for a sum of all rows is from the sum, relative to what it
            would be if nothing cancelled; about one for a gradient that is nothing but rounding.
    """

    blocks: Mapping[str, Tensor]
    unused: frozenset[str]
    residue: float

    @classmethod
    def of(cls, output: Tensor, parameters: Mapping[str, Tensor], factor: float = 1.0) -> Self:
        """One backward for each number; the graph is kept.

        The factor is multiplied in before each backward and divided out behind, so that another
        one rounds otherwise.
        """
        leaves = list(parameters.values())
        found = [
            torch.autograd.grad(
                number,
                leaves,
                torch.full_like(number, factor),
                retain_graph=True,
                allow_unused=True,
            )
            for number in output.reshape(-1)
        ]
        columns = dict(zip(parameters, zip(*found, strict=True), strict=True))
        blocks = {
            name: torch.stack([_flat(g, parameters[name]) for g in column]) / factor
            for name, column in columns.items()
        }
        unused = {name for name, column in columns.items() if all(g is None for g in column)}
        w = torch.randn(
            output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype
        )
        sums = torch.autograd.grad(output, leaves, w, retain_graph=True, allow_unused=True)
        flat = w.reshape(-1).double()
        residue = 0.0
        for block, total, p in zip(blocks.values(), sums, leaves, strict=True):
            off = row_norms((_flat(total, p) - flat @ block)[None])[0]
            residue = max(residue, float(off / (flat.abs() @ row_norms(block))) if off else 0.0)
        return cls(blocks, frozenset(unused), residue)

    @property
    def matrix(self) -> Tensor:
        return torch.cat(list(self.blocks.values()), 1)

    @property
    def finite(self) -> Tensor:
        """Which rows are, `[M]`."""
        return self.matrix.isfinite().all(1)

    @property
    def norms(self) -> Tensor:
        return row_norms(self.matrix)

    def slack(self, tolerance: Tolerance) -> dict[str, Tensor]:
        """How far each row of each parameter may be off, `[M]`."""
        whole = tolerance.whole * self.norms + tolerance.least
        return {n: tolerance.own * row_norms(block) + whole for n, block in self.blocks.items()}

    def distance(self, other: "Rows") -> dict[str, Tensor]:
        return {name: row_norms(block - other.blocks[name]) for name, block in self.blocks.items()}


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=torch.float64)
    return gradient.to_dense().reshape(-1).double()


def row_norms(rows: Tensor) -> Tensor:
    """Norms of rows of any magnitude."""
    if not rows.shape[1]:
        return rows.new_zeros(len(rows))
    largest = rows.abs().amax(1)
    safe = torch.where(largest > 0, largest, 1)
    return (rows / safe[:, None]).norm(dim=1) * largest
