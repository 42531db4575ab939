"""One combine call: the poses, how they are scored, and what their gradients flow to."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Self, TypeVar, final

import torch
from torch import Tensor, nn

from posegrad._restoring import Change
from posegrad.combination._base import outcome
from posegrad.combination._groups import Groups
from posegrad.errors import (
    NoPosesError,
    NotDifferentiableError,
    ShapeMismatchError,
    described,
)
from posegrad.graph import check_tracked, graph_clock
from posegrad.ranks import Ranks
from posegrad.schedule._batch import joined_by_pyg
from posegrad.schedule._chunks import Portion
from posegrad.schedule._inputs import Inputs, is_watched
from posegrad.schedule._memory import Known
from posegrad.schedule._plan import underflow
from posegrad.schedule._poses import Pose
from posegrad.schedule._predictions import (
    Kind,
    check_alike,
    group_predictions,
    kind_of,
    shared_predictions,
)
from posegrad.schedule._replay import Moment, Surroundings, has_other_kernels, without_graph

__all__ = [
    "DETACHED",
    "Chunk",
    "Combined",
    "Scorer",
    "Session",
]

T = TypeVar("T")


class _Fields(NamedTuple):
    prediction: Tensor
    per_pose: Tensor


@final
class Combined(_Fields):
    """What `Engine.combine` returns; all of it carries gradients.

    A tuple `(prediction, per_pose)`, and behind these whatever else the rule returns.

    Args:
        prediction: The rule's combined prediction, `[...]`.
        per_pose: The predictions of the poses, `[m, ...]`.
        extra: What the rule returns beside the prediction.

    Example:
        >>> combined = Engine(nn.Linear(3, 1)).combine(torch.zeros(5, 3), Mean())
        >>> combined.prediction.shape, combined.per_pose.shape
        (torch.Size([]), torch.Size([5]))
        >>> lowest = lambda predictions: predictions.min(dim=0)  # a value and its index
        >>> combined = Engine(nn.Linear(3, 1)).combine(torch.zeros(5, 3), lowest)
        >>> combined.extra
        (tensor(0),)
    """

    def __new__(cls, prediction: Tensor, per_pose: Tensor, *extra: Tensor) -> Self:
        return tuple.__new__(cls, (prediction, per_pose, *extra))

    @classmethod
    def of(cls, found: object, per_pose: Tensor) -> Self:
        """From what a rule returned; raises as `outcome` does."""
        prediction, extra = outcome(found)
        return cls(prediction, per_pose, *extra)

    @property
    def extra(self) -> tuple[Tensor, ...]:
        """What the rule returned beside the combined prediction."""
        return tuple(self)[2:]

    def __repr__(self) -> str:
        extra = f", extra={self.extra}" if self.extra else ""
        return f"Combined(prediction={self.prediction}, per_pose={self.per_pose}{extra})"


@dataclass(frozen=True)
class Scorer:
    """How to run the model on a chunk of poses."""

    modules: Sequence[nn.Module]
    predict: Callable[..., Any]
    collate: Callable[[list[Pose]], Any] | None

    @property
    def device(self) -> torch.device:
        """Where the model is, and so its predictions."""
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
        # A chunk of one pose may come back squeezed to a number; which pose's it is, is clear.
        alone = portion.how == "alone" or (count == 1 and output.ndim == 0)
        rows = output.unsqueeze(0) if alone else output  # [c, ...]
        if rows.ndim == 0 or len(rows) != count or rows.numel() == 0:
            raise ShapeMismatchError(_rows_message(output, portion, start))
        # One number is a scalar.
        return rows.reshape(count) if rows.ndim > 1 and rows.numel() == count else rows


@dataclass
class Chunk:
    """Some poses that were scored together.

    Args:
        start: The number of the first.
        portion: The user's own.
        predictions: `[c, ...]`, with a graph or without.
        rows: Of poses that were scored alone those of each, with the graph of each.
        leaves: Detached stand-ins for pose tensors that require grad, by number of input.
        moment: What a replay needs to know.
    """

    start: int
    portion: Portion
    predictions: Tensor
    rows: list[Tensor]
    leaves: dict[int, Tensor]
    moment: Moment

    @property
    def numbers(self) -> range:
        """The numbers of its poses."""
        return range(self.start, self.start + self.portion.count)


class Session:
    """The state of one combine call, from its first pose to its last.

    Args:
        scorer: Runs the model.
        chunks: The poses of this rank.
        inputs: What gradients flow to.
        wary: Whether to score all poses with graphs.
        ranks: With whom the group is shared, if with anyone.
        groups: Of the poses of this rank, if there are several groups.
        known: What is known of poses like these, to be added to.
        halves: Whether a chunk may be divided that runs out of memory.

    Graphs of sharded parameters are scored to be differentiated only: FSDP2 expects a backward
    after them, and their leaves are none of the parameters that the engine knows.
    """

    own: range
    """The numbers of this rank's poses among those of all, once `group` has counted them."""

    reached: set[int]
    """The numbers of the inputs that graphs reach, or might where a pose was scored without one.

    Once `group` has scored all, parameters are among them if a pose of any rank reaches them.
    """

    def __init__(
        self,
        scorer: Scorer,
        chunks: Iterable[Portion],
        inputs: Inputs,
        *,
        wary: bool,
        ranks: Ranks | None = None,
        groups: Groups | None = None,
        known: Known | None = None,
        halves: bool = False,
    ) -> None:
        self.scorer = scorer
        self.inputs = inputs
        self.ranks = ranks
        self.groups = groups
        self.surroundings = Surroundings(scorer.modules)
        self.differentiable = False
        self.has_float16 = False  # in a graph that was seen, the model's own autocast included
        self.draws = False  # whether a chunk drew random numbers
        self.known = known
        self._wary = wary or has_other_kernels(scorer.modules)
        self._halves = halves and known is not None and ranks is None
        self.reached = set()
        self._chunks = iter(chunks)
        self._halved: list[Portion] = []
        self._count = 0
        self._first: Chunk | None = None
        self._kind: Kind | None = None

    def group(self, score: Callable[[], list[Tensor]]) -> Tensor:
        """The predictions `[m, ...]` of the whole group, on every rank.

        Args:
            score: Scores this rank's poses; returns their predictions chunk by chunk.

        Raises:
            ShapeMismatchError: if poses disagree in the shape or dtype of their predictions.
            NonFinitePredictionError: naming every pose whose prediction is nan or infinite.
            NoPosesError: if no rank has any.
            RankError: if another rank failed.
        """
        if self.ranks is None:
            predictions = group_predictions(score())
            self.own = range(len(predictions))
            return predictions
        parameters = range(self.inputs.parameter_count)
        predictions, self.own, reached = shared_predictions(
            self.ranks, self.groups, score, lambda: self.reached.intersection(parameters)
        )
        self.reached.update(*reached)
        return predictions.to(self.scorer.device)

    def apply(self, rule: Callable[[], T]) -> T:
        """The result of a rule, once it has been applied on all ranks."""
        if self.ranks is None:
            return rule()
        found: list[T] = []
        self.ranks.together("apply the rule", lambda: found.append(rule()))
        return found[0]

    def first(self) -> Chunk | None:
        """The first chunk, always scored with its graph; None if this rank has no pose.

        So a tensor the engine does not track is refused before anything else is computed.
        """
        if self._first is None:
            graph = not self.inputs.is_sharded()
            self._first = next(self._scored(lambda _: graph), None)
        return self._first

    def chunks(self, *, with_graph: bool) -> Iterator[Chunk]:
        """All chunks in order, each scored once. Only one graph is alive at a time.

        An engine's first group is scored with graphs throughout: a result that the model caches
        between poses is seen there, where under no_grad it would lose its gradient in silence. A
        few graphs would not do, however alike: a cache has an entry for each pocket, and the pose
        that fills the next one may be the last. So light poses share a chunk there too, but the
        graph of each is walked against a clock of its own.
        """
        first, self._first = self.first(), None
        if first is None:
            return
        yield first
        del first

        def has_graph(portion: Portion) -> bool:
            look = self._wary or any(map(is_watched, portion.tensors()))
            return with_graph or (look and not self.inputs.is_sharded())

        for chunk in self._scored(has_graph):
            if with_graph and self.has_float16:  # only some poses go through it
                raise ValueError(underflow("The schedule"))
            yield chunk
            del chunk

    def _scored(self, has_graph: Callable[[Portion], bool]) -> Iterator[Chunk]:
        """Chunks as they are scored; one that runs out of memory is halved."""
        while (portion := self._next()) is not None:
            try:
                chunk = self._score(portion, with_graph=has_graph(portion))
            except torch.OutOfMemoryError:
                if not self._halves or portion.count < 2:
                    raise
                chunk = None
            if chunk is None:
                self._halve(portion)
                continue
            yield chunk
            del chunk

    def _next(self) -> Portion | None:
        return self._halved.pop(0) if self._halved else next(self._chunks, None)

    def _halve(self, portion: Portion) -> None:
        assert self.known is not None
        self.known.shrink(portion.count)
        self._halved[:0] = portion.halves()

    def lag(self, rounds: int | None = None) -> int:
        """How many times less often this rank will run the model than another, where that matters.

        A forward or backward of a sharded model is one of all ranks together, so this is asked
        before.

        Args:
            rounds: How often it will; default: once for each chunk of poses.

        Raises:
            NoPosesError: if it matters and this rank has no pose to run it on.
        """
        if self.ranks is None or not self.ranks.sharded:
            return 0
        if rounds is None:
            chunks = [*self._halved, *self._chunks]
            self._chunks, rounds = iter(chunks), len(chunks)
            if not chunks:
                raise NoPosesError(_IDLE)
        own = rounds
        return max(self.ranks.together("keep in step", lambda: own)) - own

    def check_differentiable(self) -> None:
        """Raises if there is something to differentiate for, but no pose that scored needs it.

        Raises:
            NotDifferentiableError: if so.
        """
        if self._count and self.inputs.tensors and not self.differentiable:
            raise NotDifferentiableError(DETACHED)

    def _score(self, portion: Portion, *, with_graph: bool) -> Chunk:
        portion = portion.copied()  # user and model may write to them
        random = self.surroundings.random_state()
        try:
            with torch.enable_grad() if with_graph else without_graph():
                predictions, leaves, rows = self._scored_rows(portion, self._count)
        except torch.OutOfMemoryError:
            self.surroundings.rewind(random)
            raise
        if portion.count > 1:
            self.draws |= not all(map(torch.equal, random, self.surroundings.random_state()))
        if with_graph and self.known is not None:
            self.known.look(portion, predictions)
        moment = self.surroundings.moment_since(random)
        chunk = Chunk(self._count, portion, predictions, rows, leaves, moment)
        self._kind = self._kind or kind_of(predictions)
        check_alike(kind_of(predictions), self._kind, self._count)
        self._count += portion.count
        return chunk

    def score_again(self, portion: Portion, start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Scores poses on detached leaves; checks the graph, if there is one."""
        predictions, leaves, _ = self._scored_rows(portion, start)
        return predictions, leaves

    def _scored_rows(
        self, portion: Portion, start: int
    ) -> tuple[Tensor, dict[int, Tensor], list[Tensor]]:
        """Likewise, and the predictions of poses that were scored alone, one by one."""
        leaves: dict[int, Tensor] = {}
        rows: list[Tensor] = []
        clocks: list[int] = []

        def scored(poses: list[Pose], count: int, number: int) -> Tensor:
            own = self.inputs.cut(poses, leaves)
            return self.scorer(Portion(own, count, portion.how), number)

        def score() -> Tensor:
            if portion.how != "alone" or portion.count == 1:
                return scored(portion.poses, portion.count, start)
            for number, pose in enumerate(portion.poses, start):
                if self._wary and torch.is_grad_enabled():
                    clocks.append(graph_clock.now())
                rows.append(scored([pose], 1, number))
                check_alike(kind_of(rows[-1]), self._kind or kind_of(rows[0]), number)
            return torch.cat(rows)

        plain = [tensor for tensor in portion.tensors() if not tensor.requires_grad]
        with _flags_kept(plain), graph_clock() as clock:
            predictions = self.inputs.scored(score)
        has_graph = torch.is_grad_enabled()  # a model may enable it for itself
        if not has_graph or self.inputs.is_sharded():
            self.reached.update(range(self.inputs.parameter_count), leaves)
        elif predictions.requires_grad:
            own = {id(tensor) for tensor in (*leaves.values(), *plain)} | self.inputs.parameters
            walks = zip(rows, clocks, strict=True) if clocks else [(predictions, clock)]
            for output, since in walks:
                self._walk(output, leaves, own, since)
        self.differentiable |= has_graph and predictions.requires_grad
        return predictions if has_graph else predictions.detach(), leaves, rows

    def _walk(
        self, output: Tensor, leaves: Mapping[int, Tensor], known: set[int], since: int
    ) -> None:
        """Checks a graph that was made since a time, and notes what it reaches."""
        if output.requires_grad:
            found = check_tracked(output, known, since)
            self.has_float16 |= found.float16
            self.reached |= self.inputs.reached(found.leaves, leaves)


DETACHED = (
    "No prediction depends on a parameter or on a pose tensor that requires grad: the model runs "
    "under no_grad or detaches its result.\n"
    "Remove the no_grad() or detach() inside the model, or call combine() under torch.no_grad() if "
    "no gradient is wanted."
)

_IDLE = (
    "This rank has no poses, and its part of the sharded parameters is needed whenever another "
    "rank scores one.\nGive every rank a pose at least."
)


@final
class _flags_kept(Change):  # noqa: N801
    """Undoes requires_grad_() on the user's poses, which models that compute forces are fond of."""

    def __init__(self, plain: list[Tensor]) -> None:
        self._plain = plain

    def make(self) -> None:
        pass  # the model does

    def undo(self) -> None:
        for tensor in self._plain:
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)


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
