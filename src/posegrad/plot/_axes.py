"""What all pictures have in common: their axes, their colours, bars of poses."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["AGAINST", "FOR", "INK", "PALE", "QUIET", "axes_of", "bars", "label_poses", "plain"]

INK, QUIET, PALE = "#22272e", "#7c8590", "#eceef1"
FOR, AGAINST = "#3d7fb0", "#e9a15f"
"""Blue and orange: told apart by every kind of sight, and in grey, where orange is the lighter."""

_LABELLED = 32  # more poses than this, and their numbers run into each other even when small


def axes_of(ax: Axes | None, *, size: tuple[float, float] = (5.6, 3.4)) -> Axes:
    """The axes given, or those of a new figure, which pyplot does not know and so does not keep."""
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def plain(ax: Axes) -> None:
    """Two quiet axes."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(colors=QUIET, labelcolor=INK, length=3)


def bars(ax: Axes, places: Sequence[float], values: Tensor, *, light: bool = False) -> None:
    """A bar for each value; those below zero are orange and hatched.

    Args:
        ax: Where to.
        places: Where each stands.
        values: Their heights.
        light: Draw paler, so that a neighbouring group is told apart.
    """
    drawn = ax.bar(places, values.tolist(), width=0.8, color=FOR, alpha=0.55 if light else 1.0)
    for bar, value in zip(drawn, values.tolist(), strict=True):
        if value < 0:
            bar.set(facecolor=AGAINST, edgecolor=INK, hatch="////", linewidth=0.4)


def label_poses(ax: Axes, places: Sequence[float], numbers: Sequence[int]) -> None:
    """The poses' numbers below their bars, if there is room for them."""
    few = len(numbers) <= _LABELLED
    ax.tick_params(axis="x", labelsize=9 if len(numbers) <= _LABELLED / 2 else 6)
    ax.set_xticks(places if few else [], labels=[str(n) for n in numbers] if few else [])
    ax.axhline(0, color=QUIET, linewidth=0.8)
