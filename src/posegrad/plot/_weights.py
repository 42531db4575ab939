"""Which poses carry the weight."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from posegrad.combination._groups import Groups
from posegrad.plot._axes import INK, QUIET, axes_of, bars, label_poses, plain
from posegrad.plot._checks import weights_of

__all__ = ["weights"]


def weights(
    weights: Tensor | None,
    *,
    groups: Tensor | Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""A bar for the weight of each pose, the heaviest first.

    The gradient of a group is :math:`\sum_i w_i \nabla \hat y_i`. A single tall bar says that one
    pose decides; equal bars, that all do. Bars below zero, orange and hatched, are poses whose
    prediction is pushed the other way.

    Args:
        weights: `[m]`: `rule.weights(predictions)`, or what `backward` returned.
        groups: As for `Engine.combine`: ids `[m]` or sizes. Groups stand side by side, in two
            shades, each with its own heaviest first.
        ax: Where to draw; default: a new figure.

    Returns:
        The axes. Poses are numbered below the bars where there are no more than 32.

    Raises:
        TypeError: if there are no weights, as of an `Aggregation`.
        NoPosesError: if they are empty, or a group is.
        ShapeMismatchError: if they are not `[m]`, or the groups are for another number of poses.
        NonFiniteGradientError: if some are nan or infinite.

    Example:
        >>> ax = plot.weights(Boltzmann(kT=0.593).weights(torch.tensor([-8.0, -9.0, -4.0])))
        >>> [f"{bar.get_height():.3f}" for bar in ax.patches]
        ['1.067', '-0.001', '-0.066']
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['1', '2', '0']
    """
    values = weights_of(weights)
    members = _members(groups, len(values))
    ax = axes_of(ax)
    places: list[float] = []
    numbers: list[int] = []
    for group, own in enumerate(members):
        ordered = own[values[own].argsort(descending=True, stable=True)]
        start = len(places) + group  # a gap between groups
        here = [float(start + i) for i in range(len(own))]
        bars(ax, here, values[ordered], light=bool(group % 2))
        if len(members) > 1:
            _name(ax, group, (here[0] + here[-1]) / 2)
        places += here
        numbers += ordered.tolist()
    if len(members) > 1:
        ax.margins(y=0.12)  # for the names
    label_poses(ax, places, numbers)
    plain(ax)
    carrying = int((values != 0).sum())
    ax.set_xlabel("pose, heaviest first", color=INK)
    ax.set_ylabel("weight", color=INK)
    ax.set_title(f"{carrying} of {len(values)} poses carry weight", color=INK, loc="left")
    return ax


def _members(groups: Tensor | Sequence[int] | None, count: int) -> Sequence[Tensor]:
    if groups is None:
        return [torch.arange(count, device="cpu")]
    owners = Groups.of(groups)
    owners.check(count)
    return owners.members()


def _name(ax: Axes, group: int, middle: float) -> None:
    above = ax.get_xaxis_transform()
    ax.text(middle, 0.98, f"group {group}", color=QUIET, ha="center", va="top", transform=above)
