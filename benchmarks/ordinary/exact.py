"""What is exact: rows by plain autograd, and how far what was found is from them."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from benchmarks.exact import Named, largest_difference
from benchmarks.ordinary.problem import MAX_NORM, Problem
from benchmarks.ordinary.ways import Found, loop_rows
from benchmarks.settings import Row

__all__ = ["Exact", "seeded"]


@dataclass(frozen=True)
class Exact:
    """Rows of a problem, in float64 if it has it.

    They are in float32 if its forward draws numbers, which would be others in float64.

    Attributes:
        rows: Each parameter's rows `[m, ...]`.
        gramian: Their inner products, over all parameters, `[m, m]`.
        weights: Of the problem, `[m]`.
    """

    rows: Named
    gramian: Tensor
    weights: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """One backward for each pose."""
        seeded()
        is_narrow = problem.is_random or not problem.has_double
        own = problem.copied() if is_narrow else problem.double()
        rows = {name: r.double() for name, r in loop_rows(own)().items()}
        gramian = torch.stack([r.flatten(1) @ r.flatten(1).T for r in rows.values()]).sum(dim=0)
        return cls(rows, gramian, problem.weights.double())

    def errors(self, task: str, found: Found) -> Row:
        """How far a way is from a task's end, relative."""
        statistic, gradient = found
        plain = torch.ones_like(self.weights)
        if task == "norms":
            return self._of_norms(statistic)
        if task == "clip":
            norms = self.gramian.diagonal().sqrt()
            return {"gradient_error": self._gradient((MAX_NORM / norms).clamp(max=1.0), gradient)}
        if task == "listen-norms":
            return {**self._of_norms(statistic), "gradient_error": self._gradient(plain, gradient)}
        if task == "upgrad":
            return {}  # where poses agree closely, its weights are a matter of rounding
        assert statistic is not None
        difference = (statistic - self.gramian).norm() / self.gramian.norm()
        weights = plain if task == "listen-gramian" else self.weights
        return {
            "gramian_error": float(difference),
            "gradient_error": self._gradient(weights, gradient),
        }

    def _of_norms(self, found: Tensor | None) -> Row:
        assert found is not None
        norms = self.gramian.diagonal().sqrt()
        sizes = norms.clamp(min=1e-6 * float(norms.max()))  # a loss of 0 has a row of rounding
        return {"norms_error": float(((found - norms) / sizes).abs().max())}

    def _gradient(self, weights: Tensor, found: Named) -> float:
        sums = {name: torch.tensordot(weights, r, dims=1) for name, r in self.rows.items()}
        zeros = {name: torch.zeros_like(g) for name, g in sums.items()}
        return largest_difference(zeros | dict(found), sums)


def seeded() -> None:
    """The same random numbers for every way's forward."""
    torch.manual_seed(0)
