"""The weights that a combination rule gives the rows of a Jacobian."""

from collections.abc import Callable

import torch
from torch import Tensor

from posegrad.combination._base import as_combination
from posegrad.errors import NotDifferentiableError, ShapeMismatchError

__all__ = ["weights_of"]


def weights_of(rule: Callable[[Tensor], Tensor], predictions: Tensor) -> Tensor:
    r""":math:`w = \partial h(\hat y) / \partial \hat y` of a rule h, in the predictions' shape.

    Raises:
        ShapeMismatchError: if the rule gives more than one number.
        NotDifferentiableError: if its result does not depend on the predictions.
    """
    leaf = predictions.detach().clone().requires_grad_()
    with torch.enable_grad():
        combined = as_combination(rule)(leaf)
    if combined.numel() != 1:
        raise ShapeMismatchError(
            f"The rule combines predictions {list(leaf.shape)} to {list(combined.shape)}, but "
            f"a backward needs one number.\nReduce it in the rule, or pass the weights."
        )
    if not combined.requires_grad:
        raise NotDifferentiableError(
            "The rule's result does not depend on the predictions, so it has no weights.\n"
            "Remove the detach() or no_grad() inside the rule."
        )
    (weights,) = torch.autograd.grad(combined.sum(), leaf)
    return weights
