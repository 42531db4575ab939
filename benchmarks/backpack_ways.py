"""Per-pose gradients by BackPACK."""

from typing import Any

from torch import nn

from benchmarks.cases import Problem
from benchmarks.per_pose import Found, Step

__all__ = ["backpack_rows"]


def backpack_rows(network: nn.Module) -> Step:
    """BackPACK's `BatchGrad` leaves the rows on the parameters; nothing stays there."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    extended = extend(network)

    def step(problem: Problem) -> Found:
        with backpack(BatchGrad()):
            extended(*problem.inputs).sum().backward()
        return None, {name: _taken(parameter) for name, parameter in network.named_parameters()}

    return step


def _taken(parameter: Any) -> Any:
    rows = parameter.grad_batch
    del parameter.grad_batch
    parameter.grad = None
    return rows
