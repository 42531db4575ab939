"""A step made from the Jacobians of independent batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import NonFiniteGradientError
from posegrad.jacobian.base import Jacobian
from posegrad.weighting._batches import weights_of_product

__all__ = ["step_of_batches"]


@restoring
def step_of_batches(
    jacobians: Sequence[Jacobian], rule: Any, scaler: torch.amp.GradScaler | None
) -> Tensor:
    """Adds the gradient that a rule makes of two batches, or of two and a third, to `.grad`.

    Args:
        jacobians: Those of the same tasks' losses, batch by batch.
        rule: Makes weights of the product of the first two.
        scaler: As for `Jacobian.backward`.

    Returns:
        The weights, `[m]`.
    """
    first, second, *third = jacobians
    try:
        weights = weights_of_product(rule, first @ second.T)
    except NonFiniteGradientError:
        if scaler is None or not scaler.is_enabled():
            raise
        weights = torch.full_like(first.output, torch.nan)  # the scaler skips the step
    if third:
        third[0].consumed().backward(weights, scaler=scaler)
    else:
        both = Jacobian.cat([first, second]).consumed()
        both.backward(torch.cat([weights, weights]) / 2, scaler=scaler)
    return weights
