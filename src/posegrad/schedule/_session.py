"""One combine call: the poses, how they are scored, and what their gradients flow to."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posegrad.capture import check_tracked, graph_clock
from posegrad.errors import (
    NonFinitePredictionError,
    NotDifferentiableError,
    ShapeMismatchError,
    listed,
)
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._plan import underflow
from posegrad.schedule._poses import Pose, copied, tensors_of
from posegrad.schedule._replay import Moment, Surroundings

__all__ = ["Chunk", "Combined", "Scorer", "Session", "group_predictions"]


Kind = tuple[torch.Size, torch.dtype]
"""What the predictions of all poses of a group must agree in."""


class Combined(NamedTuple):
    """What `Engine.combine` returns; both parts carry gradients.

    Args:
        prediction: The rule's combined prediction, `[...]`.
        per_pose: The predictions of the poses, `[m, ...]`.
    """

    prediction: Tensor
    per_pose: Tensor


@dataclass(frozen=True)
class Scorer:
    """How to run the model on a chunk of poses."""

    modules: Sequence[nn.Module]
    predict: Callable[..., Any]
    collate: Callable[[list[Pose]], Any] | None
    chunk_size: int

    def __call__(self, poses: list[Pose], start: int) -> Tensor:
        """Scores poses `start`, `start + 1`, ...; returns their predictions `[c, ...]`."""
        try:
            argument = poses[0] if self.collate is None else self.collate(poses)
            output = self.predict(*self.modules, argument)
        except Exception as error:
            error.add_note(f"This was raised while scoring {_span(start, len(poses))}.")
            raise
        return self._rows(output, len(poses), start)

    def _rows(self, output: object, count: int, start: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise NotDifferentiableError(
                f"The model returned {_described(output)} for {_span(start, count)}, but a "
                f"prediction is one tensor.\n"
                f"Pick it with Engine(model, predict=lambda model, pose: model(pose)[...])."
            )
        if not output.is_floating_point():
            raise NotDifferentiableError(
                f"The prediction of {_span(start, count)} is {output.dtype}, which has no "
                f"gradient.\nReturn a floating-point score."
            )
        rows = output.unsqueeze(0) if self.collate is None else output  # [c, ...]
        if rows.ndim == 0 or len(rows) != count or rows.numel() == 0:
            raise ShapeMismatchError(
                f"The model returned shape {list(output.shape)} for {_span(start, count)}, but "
                f"dimension 0 must hold one prediction for each of the {count} poses of the "
                f"chunk.\nReturn [{count}, ...], or move that dimension to the front in `predict`."
            )
        return rows.reshape(count) if rows.numel() == count else rows  # one number is a scalar


@dataclass
class Chunk:
    """Some poses that were scored together.

    Args:
        start: The number of the first.
        poses: The user's own.
        predictions: `[c, ...]`, with a graph or without.
        leaves: Detached stand-ins for pose tensors that require grad, by number of input.
        moment: What a replay needs to know.
    """

    start: int
    poses: list[Pose]
    predictions: Tensor
    leaves: dict[int, Tensor]
    moment: Moment


class Session:
    """The state of one combine call, from its first pose to its last."""

    def __init__(
        self, scorer: Scorer, chunks: Iterable[list[Pose]], inputs: Inputs, *, wary: bool
    ) -> None:
        self.scorer = scorer
        self.inputs = inputs
        self.surroundings = Surroundings(scorer.modules)
        self.differentiable = False
        self.has_float16 = False  # in a graph that was seen, the model's own autocast included
        self._wary = wary
        self._chunks = iter(chunks)
        self._count = 0
        self._first: Chunk | None = None
        self._kind: Kind | None = None

    def first(self) -> Chunk:
        """The first chunk, always scored with its graph.

        So a tensor the engine does not track is refused before anything else is computed.
        """
        if self._first is None:
            self._first = self._score(next(self._chunks), with_graph=True)
        return self._first

    def chunks(self, *, with_graph: bool) -> Iterator[Chunk]:
        """All chunks in order, each scored once. Only one graph is alive at a time.

        An engine's first group is scored with graphs throughout: a result that the model caches
        between poses is seen there, where under no_grad it would lose its gradient in silence.
        """
        first, self._first = self.first(), None
        yield first
        del first
        for poses in self._chunks:
            chunk = self._score(poses, with_graph=with_graph or self._wary)
            if with_graph and self.has_float16:  # only some poses go through it
                raise ValueError(underflow("The schedule"))
            yield chunk
            del chunk

    def check_differentiable(self) -> None:
        """Raises if there is something to differentiate for, but no pose that scored needs it.

        Raises:
            NotDifferentiableError: if so.
        """
        if self.inputs.tensors and not self.differentiable:
            raise NotDifferentiableError(
                "No prediction depends on a parameter or on a pose tensor that requires grad: "
                "the model runs under no_grad or detaches its result.\n"
                "Remove the no_grad() or detach() inside the model, or call combine() under "
                "torch.no_grad() if no gradient is wanted."
            )

    def _score(self, poses: list[Pose], *, with_graph: bool) -> Chunk:
        poses = [
            copied(pose) for pose in poses
        ]  # as they are now: user and model may write to them
        random = self.surroundings.random_state()
        with torch.enable_grad() if with_graph else without_graph():
            predictions, leaves = self.score_again(poses, self._count)
        moment = self.surroundings.moment_since(random)
        chunk = Chunk(self._count, poses, predictions, leaves, moment)
        self._kind = self._kind or _kind(predictions)
        _check_alike(_kind(predictions), self._kind, self._count)
        self._count += len(poses)
        return chunk

    def score_again(self, poses: list[Pose], start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Scores poses on detached leaves; checks the graph, if there is one."""
        clock = graph_clock()
        plain = [t for pose in poses for t in tensors_of(pose) if not t.requires_grad]
        cut, leaves = self.inputs.cut(poses)
        with _flags_kept(plain):
            predictions = self.scorer(cut, start)
        if not torch.is_grad_enabled():  # a model may enable it for itself
            return predictions.detach(), leaves
        if predictions.requires_grad:
            self.differentiable = True
            known = {id(tensor) for tensor in (*leaves.values(), *plain)}
            if check_tracked(predictions, known | self.inputs.parameters, clock):
                self.has_float16 = True
        return predictions, leaves


@contextmanager
def _flags_kept(plain: list[Tensor]) -> Iterator[None]:
    """Undoes requires_grad_() on the user's poses, which models that compute forces are fond of."""
    try:
        yield
    finally:
        for tensor in plain:
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)


@contextmanager
def without_graph() -> Iterator[None]:
    """Scoring that will be replayed: no graph, but the kernels of a forward that has one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its results differ in the last bits
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.clear_autocast_cache()  # casts made here carry no gradient


def group_predictions(chunks: Sequence[Tensor]) -> Tensor:
    """Joins the predictions of all chunks into `[m, ...]`, once they are all known.

    Raises:
        ShapeMismatchError: if poses disagree in the shape or dtype of their predictions.
        NonFinitePredictionError: naming every pose whose prediction is nan or infinite.
    """
    start = 0
    for chunk in chunks:
        _check_alike(_kind(chunk), _kind(chunks[0]), start)
        start += len(chunk)
    predictions = torch.cat(list(chunks))  # [m, ...]
    _check_finite(predictions.detach())
    return predictions


def _kind(predictions: Tensor) -> Kind:
    return predictions.shape[1:], predictions.dtype


def _check_alike(found: Kind, first: Kind, pose: int) -> None:
    if found != first:
        raise ShapeMismatchError(
            f"The prediction of pose {pose} is {found[1]} {list(found[0])}, that of pose 0 is "
            f"{first[1]} {list(first[0])}.\n"
            f"The poses of a group are combined component by component, so they must agree.\n"
            f"Let the model return the same shape for every pose."
        )


def _check_finite(predictions: Tensor) -> None:
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


def _span(start: int, count: int) -> str:
    return f"pose {start}" if count == 1 else f"poses {start} to {start + count - 1}"


def _described(output: object) -> str:
    kind = type(output).__name__
    return f"a {kind} of {len(output)}" if isinstance(output, tuple | list) else f"a {kind}"
