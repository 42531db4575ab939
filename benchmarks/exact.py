"""What is exact: rows by plain autograd in float64, and how far others are from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from benchmarks.cases import Problem

__all__ = ["Exact", "Named", "gradients", "largest_difference"]

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exact:
    """Per-pose gradients of a problem in float64.

    Attributes:
        rows: Each parameter's rows `[m, size]`.
        gramian: Their inner products, over all parameters, `[m, m]`.
        gradient: Their sum under the problem's weights, a parameter each.
        clipped: Their sum, each clipped to the problem's `max_norm`.
    """

    rows: dict[str, Tensor]
    gramian: Tensor
    gradient: dict[str, Tensor]
    clipped: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """One backward for each pose."""
        double = problem.double()
        parameters = dict(double.network.named_parameters())
        m, weights = problem.m, problem.weights.double()
        rows = {n: weights.new_zeros(m, p.numel()) for n, p in parameters.items()}

        y = double.network(*double.inputs).squeeze(1)  # [m]
        for i in range(m):
            gradients = torch.autograd.grad(y[i], list(parameters.values()), retain_graph=True)
            for block, row in zip(rows.values(), gradients, strict=True):
                block[i] = row.flatten()

        gramian = torch.stack([r @ r.T for r in rows.values()]).sum(dim=0)
        shorter = (problem.max_norm / gramian.diagonal().sqrt()).clamp(max=1)
        gradient, clipped = (
            {n: (w @ r).view_as(parameters[n]) for n, r in rows.items()} for w in (weights, shorter)
        )
        return cls(rows, gramian, gradient, clipped)


def largest_difference(found: Named, exact: Named) -> float:
    """The largest of `‖g_p − g64_p‖ / ‖g64_p‖` over parameters `p`; infinite if one has none.

    A parameter that the output hardly depends on, as a bias before a softmax, has a gradient that
    is zero but for the rounding of float32: both are below a millionth of the largest. It is left
    out.
    """
    if found.keys() != exact.keys():
        return float("inf")
    sizes = {name: (g.double().norm(), found[name].double().norm()) for name, g in exact.items()}
    least = 1e-6 * max(float(size) for size, _ in sizes.values())
    errors = [
        (found[n] - g).norm().double() / sizes[n][0]
        for n, g in exact.items()
        if not all(size <= least for size in sizes[n])  # nan is no reason to look away
    ]
    return float(torch.stack(errors).max())  # nan if one is, unlike Python's


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """The `.grad` of the parameters that have one."""
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
