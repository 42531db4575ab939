"""What the pictures accept."""

import torch
from torch import Tensor

from posegrad.errors import NonFiniteGradientError, NoPosesError, ShapeMismatchError, listed

__all__ = ["gramian_of", "weights_of"]


def weights_of(weights: Tensor | None) -> Tensor:
    """Weights `[m]` in float64 on the CPU.

    Raises:
        TypeError: if there are none.
        NoPosesError: if they are empty.
        ShapeMismatchError: if they are of another shape.
        NonFiniteGradientError: if some are nan or infinite.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"The weights are {type(weights).__name__}, but must be a tensor [m]. An Aggregation "
            f"such as Median has no weights, so its backward returns None.\n"
            f"Pass rule.weights(predictions), or what backward returned for a rule that has some."
        )
    if weights.ndim != 1:
        raise ShapeMismatchError(
            f"The weights have shape {list(weights.shape)}, but a picture shows one weight for "
            f"each pose, [m].\nPass one component of them, as weights[:, 0], or flatten them."
        )
    if len(weights) == 0:
        raise NoPosesError("There are no weights to draw, [0].\nLeave out groups without poses.")
    weights = weights.detach().to("cpu", torch.float64)
    _check_finite("weights", weights.isfinite())
    return weights


def gramian_of(gramian: Tensor) -> Tensor:
    """A Gramian `[m, m]` in float64 on the CPU.

    Raises:
        TypeError: if it is no tensor.
        NoPosesError: if it is empty.
        ShapeMismatchError: if it is of another shape.
        NonFiniteGradientError: if rows of it are nan or infinite.
        ValueError: if it cannot be a Gramian.
    """
    if not isinstance(gramian, Tensor):
        raise TypeError(
            f"The Gramian is a {type(gramian).__name__}, but must be a tensor [m, m].\n"
            f"Pass J.gramian()."
        )
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ShapeMismatchError(
            f"The Gramian has shape {list(gramian.shape)}, but a picture shows one row for each "
            f"pose, [m, m].\nPass J.gramian() of an output [m], such as one loss for each pose."
        )
    if len(gramian) == 0:
        raise NoPosesError("The Gramian is empty, [0, 0].\nLeave out groups without poses.")
    gramian = gramian.detach().to("cpu", torch.float64)
    _check_finite("rows of the Gramian", gramian.isfinite().all(dim=1))
    negative = (gramian.diagonal() < 0).nonzero().flatten().tolist()
    if negative or not torch.allclose(gramian, gramian.mT, rtol=1e-3, atol=_slack(gramian)):
        found = f"negative squares for poses {listed(negative)}" if negative else "no symmetry"
        raise ValueError(
            f"The matrix has {found}, so it is no Gramian, whose entries are inner products.\n"
            f"Pass G = J.gramian(); cosines are computed here."
        )
    return gramian


def _slack(gramian: Tensor) -> float:
    return 1e-5 * float(gramian.diagonal().amax())


def _check_finite(what: str, finite: Tensor) -> None:
    if bool(finite.all()):
        return
    places = (~finite).nonzero().flatten().tolist()
    raise NonFiniteGradientError(
        f"{len(places)} of {len(finite)} {what} are nan or infinite: numbers {listed(places)}.\n"
        f"They have no place in a picture, and such a step would ruin the parameters.\n"
        f"Leave those poses out, or find out why: float16, or a loss without bound."
    )
