"""A Jacobian that an engine reads, against the rows of plain autograd."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from tests.reference import rows, trainable

__all__ = ["assert_exact"]


def assert_exact(
    engine: Engine,
    model: nn.Module,
    output: Tensor,
    *,
    of: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> PoseJacobian:
    """Reads an output's Jacobian, whose rows must be right, by default of all that is trained."""
    expected = rows(output, trainable(model) if of is None else of)
    J = engine.jacobian(output, **options)
    torch.testing.assert_close(J.matrix(), expected)
    return J
