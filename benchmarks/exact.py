"""What is exact: rows by plain autograd in float64, and how far others are from them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from benchmarks.cases import Problem

__all__ = ["Exact", "Named", "largest_difference"]

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exact:
    """Per-pose gradients of a problem in float64.

    Attributes:
        rows: Each parameter's rows `[m, size]`.
        gramian: Their inner products, over all parameters, `[m, m]`.
        gradient: Their sum under the problem's weights, a parameter each.
    """

    rows: dict[str, Tensor]
    gramian: Tensor
    gradient: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """One backward for each pose."""
        network = copy.deepcopy(problem.network).double()
        inputs = [x.double() if x.is_floating_point() else x for x in problem.inputs]
        parameters = dict(network.named_parameters())
        m, weights = problem.m, problem.weights.double()
        rows = {n: weights.new_zeros(m, p.numel()) for n, p in parameters.items()}

        y = network(*inputs).squeeze(1)  # [m]
        for i in range(m):
            gradients = torch.autograd.grad(y[i], list(parameters.values()), retain_graph=True)
            for block, row in zip(rows.values(), gradients, strict=True):
                block[i] = row.flatten()

        gramian = torch.stack([r @ r.T for r in rows.values()]).sum(dim=0)
        gradient = {n: (weights @ r).view_as(parameters[n]) for n, r in rows.items()}
        return cls(rows, gramian, gradient)


def largest_difference(found: Named, exact: Named) -> float:
    """`max_p ‖g_p − g64_p‖ / ‖g64_p‖` over parameters `p`; infinite if one has no gradient."""
    if found.keys() != exact.keys():
        return float("inf")
    return max(float((found[n] - g).norm() / g.norm()) for n, g in exact.items() if g.any())
