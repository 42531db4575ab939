"""Gathers the Jacobian of poses that are scored in chunks."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad.errors import NotDifferentiableError, ShapeMismatchError
from posegrad.graph import Gatherer
from posegrad.jacobian import PoseJacobian
from posegrad.schedule._chunks import Portion
from posegrad.schedule._scorer import Scorer

__all__ = ["FORMS", "Loss", "gather", "in_form"]

T = TypeVar("T")

Loss = Callable[[Tensor, Tensor], Tensor]
"""From predictions `[c, ...]` and the numbers of their poses `[c]` to rows `[c, ...]`."""

FORMS = ("auto", "factors", "dense")


@restoring
def gather(
    gatherer: Gatherer,
    scorer: Scorer,
    chunks: Iterator[Portion],
    look: Callable[[Portion, Tensor], None],
    parameters: Mapping[str, nn.Parameter],
    loss: Loss | None,
    keep: Callable[[PoseJacobian], T],
    start: int = 0,
) -> list[T]:
    """Scores chunk after chunk, and keeps of each Jacobian what `keep` returns.

    Args:
        gatherer: Reads the rows.
        scorer: Runs the model.
        chunks: The poses.
        look: Called with each chunk and its predictions.
        parameters: The parameters to differentiate by.
        loss: Computes the rows from the predictions; default: they are the predictions.
        keep: What to keep of a chunk's Jacobian, which nobody else holds.
        start: The number of the first pose.

    Raises:
        NotDifferentiableError: if no prediction depends on a parameter.
    """
    found: list[T] = []
    shape, used, count = torch.Size(), False, start
    for portion in chunks:
        with torch.enable_grad():
            rows = scorer(portion, count)
            look(portion, rows)
            if loss is not None:
                rows = _of_loss(loss, rows, count)
        shape = _alike(rows, shape if found else rows.shape[1:], count, start)
        jacobian = gatherer.read(rows, parameters, must_depend=False)
        used |= bool(jacobian.used)
        found.append(keep(jacobian))
        count += portion.count
    if not used:
        raise NotDifferentiableError(
            "No prediction depends on a trainable parameter: the model detaches its result, or "
            "everything it uses is frozen.\nRemove the detach(), or unfreeze a parameter."
        )
    return found


def in_form(form: str) -> Callable[[PoseJacobian], PoseJacobian]:
    """The function that keeps the rows of a chunk in a form.

    Raises:
        ValueError: if the form is none of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; it is one of {', '.join(FORMS)}.")
    return lambda jacobian: jacobian.in_form(form)


def _of_loss(loss: Loss, predictions: Tensor, start: int) -> Tensor:
    if type(loss).__module__ == "torch.nn.modules.loss":
        raise TypeError(
            f"loss is a {type(loss).__name__}, which would take the numbers of the poses, its "
            f"second argument, for their targets.\n"
            f"Pass lambda predictions, i: loss(predictions, targets[i]), with reduction='none'."
        )
    count = len(predictions)
    rows = loss(predictions, torch.arange(start, start + count, device=predictions.device))
    rows = rows.reshape(1) if count == 1 and rows.ndim == 0 else rows
    if rows.ndim == 0 or len(rows) != count:
        raise ShapeMismatchError(
            f"The loss returned shape {list(rows.shape)} for {count} poses, but dimension 0 must "
            f"hold one row for each.\nLeave out the reduction: "
            f"lambda predictions, i: (predictions - targets[i]).square()."
        )
    return rows


def _alike(rows: Tensor, shape: torch.Size, number: int, first: int) -> torch.Size:
    """The shape of a row, which must be that of all others."""
    if rows.shape[1:] != shape:
        raise ShapeMismatchError(
            f"The rows of pose {number} have shape {list(rows.shape[1:])}, those of pose {first} "
            f"{list(shape)}.\nLet the model return the same shape for every pose."
        )
    return shape
