"""Which poses agree."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from posegrad.plot._axes import AGAINST, FOR, INK, PALE, QUIET, axes_of, plain
from posegrad.plot._checks import gramian_of

__all__ = ["gramian"]

_WRITTEN = 12  # more poses than this, and numbers do not fit into the cells


def gramian(gramian: Tensor, *, ax: Axes | None = None) -> Axes:
    r"""The Gramian as a map of cosines, beside the norms it hides.

    .. math::
        \cos_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}, \qquad \|g_i\| = \sqrt{G_{ii}}

    Blue poses pull the parameters the same way; orange ones against each other, which the map also
    marks with a minus, as grey print shows no hue. White is at right angles. A pose whose gradient
    is zero has no direction: its cells are grey. The norms, which cosines hide, are at the right.

    Args:
        gramian: G `[m, m]`, of `J.gramian()`.
        ax: Where to draw; default: a new figure. The norms and the scale go to its right.

    Returns:
        The axes of the map; cosines are written into the cells where there are no more than 12.

    Raises:
        NoPosesError: if it is empty.
        ShapeMismatchError: if it is not `[m, m]`.
        NonFiniteGradientError: if rows of it are nan or infinite.
        ValueError: if it is not symmetric, or has negative squares.

    Example:
        >>> ax = plot.gramian(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        >>> ax.images[0].get_array().tolist()
        [[1.0, -0.5], [-0.5, 1.0]]
    """
    squares = gramian_of(gramian)
    norms = squares.diagonal().sqrt()  # [m]
    cosines = (squares / torch.outer(norms, norms)).clamp(-1, 1)  # [m, m], nan for a norm of zero
    ax = axes_of(ax, size=(5.4, 4.0))
    colours = LinearSegmentedColormap.from_list("agreement", [AGAINST, "white", FOR])
    shown = np.ma.masked_invalid(cosines.numpy())
    image = ax.imshow(shown, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    ax.set_facecolor(PALE)  # seen through cells that are left out
    _mark(ax, cosines)
    _draw_norms(ax, norms)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(_WRITTEN, integer=True, steps=[1, 2, 5, 10]))
    ax.tick_params(colors=QUIET, labelcolor=INK, length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("pose", color=INK)
    ax.set_ylabel("pose", color=INK)
    ax.set_title("cosines of gradients", color=INK, loc="left")
    scale = ax.inset_axes((1.34, 0, 0.05, 1))
    ax.get_figure(root=True).colorbar(image, cax=scale, ticks=[-1, 0, 1])  # type: ignore[union-attr]
    scale.tick_params(colors=QUIET, labelcolor=INK, length=3)
    return ax


def _mark(ax: Axes, cosines: Tensor) -> None:
    """Cosines in the cells, or a minus where they are below zero."""
    m = len(cosines)
    if m <= _WRITTEN:
        for row, column in cosines.isfinite().nonzero().tolist():
            text = f"{float(cosines[row, column]):.1f}".replace("-0.0", "0.0")
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=INK)
        return
    rows, columns = (cosines < 0).nonzero(as_tuple=True)
    width = ax.get_window_extent().width * 72 / ax.figure.dpi / m  # of a cell, in points
    ax.scatter(
        columns.tolist(),
        rows.tolist(),
        s=(0.35 * width) ** 2,
        marker="_",
        color=INK,
        linewidths=0.5,
    )


def _draw_norms(ax: Axes, norms: Tensor) -> None:
    beside = ax.inset_axes((1.04, 0, 0.2, 1), sharey=ax)
    beside.barh(range(len(norms)), norms.tolist(), height=0.8, color=QUIET)
    plain(beside)
    beside.tick_params(left=False, labelleft=False)
    beside.spines["left"].set_visible(False)
    beside.set_xticks([0, float(norms.amax())], labels=["0", f"{float(norms.amax()):.3g}"])
    beside.set_xlabel("norm", color=INK)
