r"""Rules whose weights are made of independent batches.

With one batch, :math:`w^\top G w` is a biased estimate of what such a rule minimises; with the
product :math:`J_1 J_2^\top` of two it is not, and stochastic methods converge.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posegrad.errors import ShapeMismatchError
from posegrad.weighting._base import check_finite, plainly
from posegrad.weighting._rules import ADAPTER, is_of_torchjd

__all__ = ["check_batches", "weights_of_product"]


def check_batches(rule: object, shapes: Sequence[torch.Size]) -> None:
    """Refuses rules of one batch, and batches that do not fit each other.

    Raises:
        TypeError: if the rule is not made for several batches.
        ShapeMismatchError: if there are not two or three, of as many losses.
    """
    found = is_of_torchjd(rule) and importlib.import_module(ADAPTER).weighs_two_batches(rule)
    if not found:
        raise TypeError(
            f"{type(rule).__name__} is a rule of one batch, but {len(shapes)} were passed.\n"
            f"Pass one output; MoDoWeighting and SDMGradWeighting of TorchJD are for several."
        )
    if len(shapes) not in (2, 3) or len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ShapeMismatchError(
            f"The losses of the batches have shapes {[list(shape) for shape in shapes]}, but row i "
            f"of each must be the same task's: two or three tensors [m].\n"
            f"Reduce each task's loss to one number, and stack them."
        )


def weights_of_product(rule: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """The weights of a rule, `[m]`, from the product of two Jacobians `[m, m]`.

    Raises:
        NonFiniteGradientError: if the product or the weights are not finite.
        ShapeMismatchError: if there is not one weight for each row.
    """
    check_finite(product.square().sum(1))
    with plainly():
        weights = rule(product)
    if weights.shape != product.shape[:1]:
        raise ShapeMismatchError(
            f"{type(rule).__name__} gave weights of shape {list(weights.shape)} for "
            f"{len(product)} rows."
        )
    check_finite(weights)
    return weights.detach().clone()
