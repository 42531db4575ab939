"""Joins the predictions of chunks and ranks into those of a whole group."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from posegrad.combination._groups import Groups
from posegrad.errors import NonFinitePredictionError, NoPosesError, ShapeMismatchError, listed
from posegrad.ranks import Ranks

__all__ = ["Kind", "check_alike", "group_predictions", "kind_of", "shared_predictions"]

T = TypeVar("T")

Kind = tuple[torch.Size, torch.dtype]
"""What the predictions of all poses in a group must agree on."""


def group_predictions(chunks: Sequence[Tensor]) -> Tensor:
    """Joins the predictions of all chunks into `[m, ...]`, once they are all known.

    Raises:
        NoPosesError: if there are none.
        ShapeMismatchError: if poses disagree in the shape or dtype of their predictions.
        NonFinitePredictionError: naming every pose whose prediction is nan or infinite.
    """
    if not chunks:
        raise NoPosesError(
            "There are no poses on any rank: a combination of none is undefined.\n"
            "Leave compounds without poses out of the loop."
        )
    start = 0
    for chunk in chunks:
        check_alike(kind_of(chunk), kind_of(chunks[0]), start)
        start += len(chunk)
    predictions = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))  # [m, ...]
    _check_finite(predictions.detach())
    return predictions


def shared_predictions(
    ranks: Ranks,
    groups: Groups | None,
    score: Callable[[], list[Tensor]],
    note: Callable[[], T],
) -> tuple[Tensor, range, list[T]]:
    """The predictions of all ranks, on the CPU; which are this rank's; and the notes of all ranks.

    Args:
        ranks: The ranks that share the group.
        groups: The groups of this rank's poses, if there are several.
        score: Scores this rank's poses.
        note: What the ranks tell each other afterwards.
    """

    def scored() -> tuple[Tensor | None, T]:
        values = score()
        if groups is not None:
            groups.check(sum(map(len, values)))
        return group_predictions(values).detach().cpu() if values else None, note()

    everyone, notes = zip(*ranks.together("score poses", scored), strict=True)
    counts = [0 if values is None else len(values) for values in everyone]
    start = sum(counts[: ranks.own])
    own = range(start, start + counts[ranks.own])
    present = [values for values in everyone if values is not None]
    return group_predictions(present), own, list(notes)


def kind_of(predictions: Tensor) -> Kind:
    """The kind of predictions `[c, ...]`."""
    return predictions.shape[1:], predictions.dtype


def check_alike(found: Kind, first: Kind, pose: int) -> None:
    """Refuses predictions of another kind than the first.

    Raises:
        ShapeMismatchError: if they differ, naming their first pose.
    """
    if found != first:
        raise ShapeMismatchError(
            f"The prediction of pose {pose} is {found[1]} {list(found[0])}, that of pose 0 is "
            f"{first[1]} {list(first[0])}.\n"
            f"The poses of a group are combined component by component, so they must agree.\n"
            f"Let the model return the same shape for every pose."
        )


def _check_finite(predictions: Tensor) -> None:
    if isfinite(predictions.sum()):  # one operator, as almost always suffices
        return
    finite = predictions.isfinite()
    if bool(finite.all()):
        return
    offenders = (~finite.flatten(1).all(dim=1) if finite.ndim > 1 else ~finite).nonzero().flatten()
    numbers = offenders.tolist()
    values = ", ".join(str(predictions[i].tolist()) for i in numbers[:5])
    raise NonFinitePredictionError(
        f"The predictions of {len(offenders)} of {len(predictions)} poses are not finite: "
        f"poses {listed(numbers)}, predictions {values}.\n"
        f"A combination of them would be nan and so would every gradient.\n"
        f"Check those inputs, or drop them before combine(); the model's parameters and .grad are "
        f"untouched."
    )
