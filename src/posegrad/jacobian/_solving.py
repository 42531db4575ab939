"""Solves damped linear systems with a Gramian."""

import math

import torch
from torch import Tensor

from posegrad.errors import IllConditionedError
from posegrad.weighting._base import check_finite

__all__ = ["checked_damping", "solved"]


def checked_damping(damping: float) -> float:
    """Returns the damping, checked.

    Raises:
        ValueError: if it is negative or not finite.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(
            f"damping is {damping}, but it must be a finite number from 0 on: it is added to the "
            f"diagonal of the Gramian, whose eigenvalues are not negative."
        )
    return damping


def solved(gramian: Tensor, right: Tensor, damping: float, eps: float) -> Tensor:
    r"""The solution of :math:`(G + \lambda I) w = r`.

    Args:
        gramian: G `[M, M]`, in float64.
        right: r `[M]`.
        damping: :math:`\lambda`.
        eps: The relative error of J's rows. An eigenvalue of G, a squared singular value of J, is
            rounding error below `eps**2` times the largest.

    Raises:
        NonFiniteGradientError: if rows are nan or infinite.
        IllConditionedError: if an eigenvalue of the sum is mere rounding error.
    """
    check_finite(gramian.diagonal())
    values, vectors = torch.linalg.eigh(gramian)
    values = values.clamp(min=0)
    if not len(values):
        return right.double()
    largest, smallest = float(values[-1]), float(values[0]) + damping
    noise = len(values) * max(torch.finfo(torch.float64).eps, eps**2)
    if not smallest > noise * (largest + damping):
        raise IllConditionedError(
            f"G + damping I has no definite solution: its eigenvalues go from {smallest:.2g} to "
            f"{largest + damping:.2g}, and below {noise * (largest + damping):.2g} they are "
            f"rounding errors.\n"
            f"Rows of J are alike, or depend on each other: there may be more of them than "
            f"parameters, or some are zero.\n"
            f"Pass damping={1e3 * noise * largest or 1.0:.1g} or more, or leave rows out."
        )
    found: Tensor = vectors @ ((vectors.mT @ right.double()) / (values + damping))
    return found
