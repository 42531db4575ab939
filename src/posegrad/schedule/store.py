"""Schedule `store`: keep the m rows of the Jacobian instead of the m graphs."""

import torch
from torch import Tensor

from posegrad.combination import Combination
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._session import Chunk, Combined, Session, group_predictions

__all__ = ["store"]


def store(session: Session, rule: Combination) -> Combined:
    """Differentiates every pose at once, as mtenn does, and weighs the gradients in backward.

    Memory: m gradients of parameter size (times d for predictions of d numbers). Time: m forwards
    and m d backwards. Serves any rule and any loss of both outputs without scoring a pose twice.
    """
    values: list[Tensor] = []
    rows: list[dict[int, Tensor]] = []  # one per prediction, in the order of `values` flattened
    for chunk in session.chunks(with_graph=True):
        rows += _rows(session, chunk)
        values.append(chunk.predictions.detach())
    session.check_differentiable()
    places = [(i, number) for i, row in enumerate(rows) for number in row]

    def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
        (cotangent,) = cotangents
        total = GradientSum()
        weights = [] if cotangent is None else cotangent.flatten().tolist()  # one wait for a GPU
        for (i, number), gradient in zip(places if weights else [], saved, strict=bool(weights)):
            if gradient is not None and weights[i] != 0:
                total.add({number: gradient}, weights[i])
        return total.delivered(session.inputs.tensors)

    saved = [rows[i][number] for i, number in places]
    (per_pose,) = attach([group_predictions(values)], session.inputs, pullback, saved)
    return Combined(rule(per_pose), per_pose)


def _rows(session: Session, chunk: Chunk) -> list[dict[int, Tensor]]:
    """The gradient of every number the chunk predicted, one backward each."""
    flat = chunk.predictions.reshape(-1)
    units = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    last = len(flat) - 1
    return [
        session.inputs.gradients(flat, unit, chunk.leaves, keep_graph=i < last)
        for i, unit in enumerate(units)
    ]
