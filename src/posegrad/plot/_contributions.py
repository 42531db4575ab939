"""Which poses move the step, and which are moved against."""

import torch
from matplotlib.axes import Axes
from torch import Tensor

from posegrad.errors import ShapeMismatchError
from posegrad.plot._axes import INK, axes_of, bars, label_poses, plain
from posegrad.plot._checks import gramian_of, weights_of

__all__ = ["contributions"]


def contributions(gramian: Tensor, weights: Tensor | None, *, ax: Axes | None = None) -> Axes:
    r"""A bar for the share that each pose has in the combined gradient, the largest first.

    The combined gradient is :math:`g = \sum_i w_i g_i`. What pose i adds along it, as a share of
    its length, needs no gradient, only inner products:

    .. math::
        c_i = \frac{\langle w_i g_i, g \rangle}{\|g\|^2}
            = \frac{w_i \sum_j \langle g_i, g_j \rangle w_j}
                   {\sum_{kj} w_k \langle g_k, g_j \rangle w_j}
            = \frac{w_i (G w)_i}{w^\top G w}, \qquad \sum_i c_i = 1

    A heavy pose with a small gradient, or at right angles to the others, has a small share. A share
    below zero, orange and hatched, belongs to a pose that pulls against the step: a step
    :math:`-\eta g` changes its :math:`w_i \hat y_i` by :math:`-\eta c_i \|g\|^2` at first order,
    the wrong way.

    Args:
        gramian: G `[m, m]`, of `J.gramian()`.
        weights: w `[m]`, as for `plot.weights`.
        ax: Where to draw; default: a new figure.

    Returns:
        The axes. Poses are numbered below the bars where there are no more than 32.

    Raises:
        TypeError: if there are no weights, as of an `Aggregation`.
        NoPosesError: if there are no poses.
        ShapeMismatchError: if the shapes are not `[m, m]` and `[m]`.
        NonFiniteGradientError: if numbers are nan or infinite.
        ValueError: if the combined gradient is zero, or the matrix is no Gramian.

    Example:
        >>> G = torch.tensor([[4.0, -1.0], [-1.0, 0.5]])
        >>> ax = plot.contributions(G, torch.tensor([0.5, 0.5]))
        >>> [f"{bar.get_height():.1f}" for bar in ax.patches]
        ['1.2', '-0.2']
    """
    squares, values = gramian_of(gramian), weights_of(weights)
    if len(values) != len(squares):
        raise ShapeMismatchError(
            f"There are {len(values)} weights and a Gramian of {len(squares)} poses.\n"
            f"Pass the weights of the same poses, in the same order."
        )
    parts = values * (squares @ values)  # [m], of them the squared length of g is the sum
    _check_moves(parts, values.abs() @ squares.diagonal().sqrt(), gramian.dtype)
    shares = parts / parts.sum()
    order = shares.argsort(descending=True, stable=True)
    ax = axes_of(ax)
    places = [float(i) for i in range(len(order))]
    bars(ax, places, shares[order])
    label_poses(ax, places, order.tolist())
    plain(ax)
    against = int((shares < 0).sum())
    ax.set_xlabel("pose, largest share first", color=INK)
    ax.set_ylabel("share of the step", color=INK)
    ax.set_title(f"{against} of {len(shares)} poses pull against the step", color=INK, loc="left")
    return ax


def _check_moves(parts: Tensor, reach: Tensor, dtype: torch.dtype) -> None:
    """Refuses a combined gradient that is nothing but the rounding of terms that cancel."""
    if (
        float(parts.sum())
        <= torch.finfo(torch.promote_types(dtype, torch.float32)).eps * float(reach) ** 2
    ):
        raise ValueError(
            "The combined gradient is zero: the weights are, or the poses cancel. It has no "
            "direction, so no pose has a share in it.\n"
            "Draw plot.weights and plot.gramian instead."
        )
