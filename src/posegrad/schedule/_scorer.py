"""Runs the model on poses, and checks its predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad.errors import NotDifferentiableError, ShapeMismatchError, described
from posegrad.schedule._batch import joined_by_pyg
from posegrad.schedule._chunks import Portion
from posegrad.schedule._poses import Pose

__all__ = ["Scorer"]


@final
@dataclass(frozen=True)
class Scorer:
    """Runs the model on chunks of poses."""

    modules: Sequence[nn.Module]
    predict: Callable[..., Any]
    collate: Callable[[list[Pose]], Any] | None

    @property
    def device(self) -> torch.device:
        """The device of the model, and so of its predictions."""
        tensors = (t for m in self.modules for t in chain(m.parameters(), m.buffers()))
        first = next(tensors, None)
        return torch.device("cpu") if first is None else first.device

    def __call__(self, portion: Portion, start: int) -> Tensor:
        """Scores poses `start`, `start + 1`, ...; returns their predictions `[c, ...]`."""
        try:
            argument = portion.poses[0]
            if portion.how == "joined":
                argument = (self.collate or joined_by_pyg)(portion.poses)
            output = self.predict(*self.modules, argument)
        except Exception as error:
            error.add_note(f"This was raised while scoring {_span(start, portion.count)}.")
            if portion.how != "joined" and isinstance(portion.poses[0], list | tuple | Mapping):
                error.add_note(_unpacking(portion))
            raise
        return self._rows(output, portion, start)

    def _rows(self, output: object, portion: Portion, start: int) -> Tensor:
        count = portion.count
        if not isinstance(output, Tensor):
            raise NotDifferentiableError(
                f"The model returned {described(output)} for {_span(start, count)}, but a "
                f"prediction is one tensor.\n"
                f"Pick it with Engine(model, predict=lambda model, pose: model(pose)[...])."
            )
        if not output.is_floating_point():
            raise NotDifferentiableError(
                f"The prediction of {_span(start, count)} is {output.dtype}, and only a real "
                f"floating-point number has a gradient.\nReturn one: of a complex one its .real, "
                f"its .abs(), or both parts by torch.view_as_real()."
            )
        # One pose may come back squeezed to a number, which can only be its prediction.
        alone = portion.how == "alone" or (count == 1 and output.ndim == 0)
        rows = output.unsqueeze(0) if alone else output  # [c, ...]
        if rows.ndim == 0 or len(rows) != count or rows.numel() == 0:
            raise ShapeMismatchError(_rows_message(output, portion, start))
        # A prediction of one number is a scalar.
        return rows.reshape(count) if rows.ndim > 1 and rows.numel() == count else rows


def _span(start: int, count: int) -> str:
    return f"pose {start}" if count == 1 else f"poses {start} to {start + count - 1}"


def _rows_message(output: Tensor, portion: Portion, start: int) -> str:
    count = portion.count
    remedy = (
        "If the model scores single poses, without a batch dimension, pass list(poses), which is "
        "walked. Else return"
        if portion.how == "slice"
        else "Return"
    )
    return (
        f"The model returned shape {list(output.shape)} for {_span(start, count)}, but dimension 0 "
        f"must hold one prediction for each of the {count} poses of the chunk.\n{remedy} "
        f"[{count}, ...], or move that dimension to the front in `predict`."
    )


def _unpacking(portion: Portion) -> str:
    """What to do about a model that cannot take a container as it is."""
    poses = portion.poses[0]
    kind, stars = ("mapping", "**") if isinstance(poses, Mapping) else ("sequence", "*")
    name = "batch" if portion.how == "slice" else "pose"
    groups = "; or, if it holds the poses of one compound, join these lists and pass groups="
    return (
        f"The {name} is a {kind} ({type(poses).__name__}), and the model was called with it as it "
        f"is. Engine(model, predict=lambda model, {name}: model({stars}{name})) unpacks it"
        f"{'' if name == 'batch' else groups}."
    )
