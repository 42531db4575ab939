"""The Jacobian of poses scored in chunks."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad.errors import NotDifferentiableError, ShapeMismatchError
from posegrad.graph import Gatherer
from posegrad.jacobian import PoseJacobian
from posegrad.schedule._chunks import Portion
from posegrad.schedule._session import Scorer

__all__ = ["FORMS", "Loss", "gather"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""From predictions `[c, ...]` and the numbers of their poses `[c]` to rows `[c, ...]`."""

FORMS = ("auto", "factors", "dense")


@restoring
def gather(
    gatherer: Gatherer,
    scorer: Scorer,
    chunks: Iterator[Portion],
    parameters: Mapping[str, nn.Parameter],
    loss: Loss | None,
    form: str,
) -> PoseJacobian:
    """Scores chunk after chunk, and keeps of each the rows of its Jacobian.

    Args:
        gatherer: Reads the rows.
        scorer: Runs the model.
        chunks: The poses.
        parameters: What to differentiate by.
        loss: Made of the predictions, if not they themselves.
        form: One of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; it is one of {', '.join(FORMS)}.")
    jacobians: list[PoseJacobian] = []
    count = 0
    for portion in chunks:
        with torch.enable_grad():
            rows = scorer(portion, count)
            if loss is not None:
                rows = _of_loss(loss, rows, count)
        _check_alike(rows, jacobians, count)
        jacobian = gatherer.gather(rows, parameters, must_depend=False)
        jacobians.append(jacobian.in_form(form))
        count += portion.count
    if not any(block.parts for jacobian in jacobians for block in jacobian.blocks.values()):
        raise NotDifferentiableError(
            "No prediction depends on a trainable parameter: the model detaches its result, or "
            "everything it uses is frozen.\nRemove the detach(), or unfreeze a parameter."
        )
    return PoseJacobian.joined(jacobians)


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


def _check_alike(rows: Tensor, jacobians: list[PoseJacobian], start: int) -> None:
    if jacobians and rows.shape[1:] != jacobians[0].output_shape[1:]:
        raise ShapeMismatchError(
            f"The rows of pose {start} have shape {list(rows.shape[1:])}, those of pose 0 "
            f"{list(jacobians[0].output_shape[1:])}.\nLet the model return the same shape for "
            f"every pose."
        )
