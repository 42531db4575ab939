"""One running call: it scores the poses and checks their graphs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, final

import torch
from torch import Tensor

from posegrad._restoring import Change
from posegrad.errors import NoPosesError, NotDifferentiableError
from posegrad.graph import Gatherer, check_tracked, graph_clock
from posegrad.schedule._call import Call
from posegrad.schedule._chunks import Portion
from posegrad.schedule._cutting import cut
from posegrad.schedule._inputs import Inputs, is_watched
from posegrad.schedule._plan import underflow
from posegrad.schedule._poses import Pose
from posegrad.schedule._predictions import (
    Kind,
    check_alike,
    group_predictions,
    kind_of,
    shared_predictions,
)
from posegrad.schedule._replay import (
    Moment,
    Start,
    Surroundings,
    has_other_kernels,
    without_graph,
)

__all__ = ["DETACHED", "Chunk", "HalvedError", "Run"]

T = TypeVar("T")


@final
class HalvedError(Exception):
    """All poses in one chunk ran out of memory; its halves are for a schedule with fewer graphs."""


@final
@dataclass
class Chunk:
    """Poses that were scored together.

    Args:
        start: The number of the first pose.
        portion: The poses, as the user passed them.
        predictions: `[c, ...]`, with a graph or without.
        rows: For poses that were scored alone, each prediction with its graph.
        leaves: Detached stand-ins for pose tensors that require grad, by number of input.
        moment: What a replay needs.
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


@final
class Run:
    """One running call: its poses, first to last, and what came of them so far.

    Graphs of sharded parameters are only made to be differentiated: FSDP2 expects a backward after
    them, and their leaves are not the parameters that the engine knows.

    Args:
        call: What is asked for.
        gatherer: Reads Jacobians off graphs.
        chunks: The poses of this rank.
    """

    own: range
    """The numbers of this rank's poses among all, once `group` has counted them."""

    reached: set[int]
    """The numbers of the inputs that graphs reach, or might reach where there was no graph.

    Once `group` has scored all, they include parameters that a pose of any rank reaches.
    """

    def __init__(self, call: Call, gatherer: Gatherer, chunks: Iterator[Portion]) -> None:
        self.call = call
        self.gatherer = gatherer
        self.scorer = call.options.scorer()
        self.ranks = call.ranks
        self.groups = call.groups
        self.known = None if call.request.sharded else call.division.known
        self.differentiable = False
        self.has_float16 = False  # in a graph seen so far, by the model's own autocast too
        self.draws = False  # whether a chunk drew random numbers
        self.reached = set()
        self._chunks = chunks
        self._halved: list[Portion] = []
        self._count = 0
        self._first: Chunk | None = None
        self._kind: Kind | None = None

    @cached_property
    def inputs(self) -> Inputs:
        """What gradients flow to."""
        return Inputs(self.call.named, self.ranks, self.call.options.roster.parts())

    @cached_property
    def surroundings(self) -> Surroundings:
        """What else forwards depend on, as the first found it."""
        return Surroundings(self.scorer.modules)

    @cached_property
    def _is_wary(self) -> bool:
        """Whether to score all poses with graphs."""
        hooked = self.call.options.is_wary or self.call.has_hooks
        return hooked or has_other_kernels(self.scorer.modules)

    def are_apart(self, portion: Portion) -> bool:
        """Whether the poses of a chunk stay apart: as seen or, for stated chunks, as proved."""
        division = self.call.division
        if not division.is_stated:
            return (True, portion.is_ragged()) in division.known.apart
        return self.call.options.apart.proves(portion, division.known, self.scorer)

    def plainly(self) -> list[Tensor]:
        """The predictions as the model returns them, chunk by chunk, with all graphs kept.

        Without gradients, a chunk that runs out of memory is halved.

        Raises:
            HalvedError: if the chunk held all poses, and ran out of memory with its graph.
            torch.OutOfMemoryError: if another chunk ran out of memory and cannot be halved.
        """
        found: list[Tensor] = []
        while (portion := self._next()) is not None:
            predictions = self._plain(portion)
            if predictions is None:
                self._halve(portion)
                if torch.is_grad_enabled():
                    raise HalvedError
                continue
            found.append(predictions)
            self._count += portion.count
            if self.known is not None:
                self.known.look(portion, predictions)
        return found

    def _plain(self, portion: Portion) -> Tensor | None:
        """The predictions of a chunk; None if it ran out of memory and may be halved."""
        if not (self._may_halve(portion) and self.call.division.may_overrun):
            return self.scorer(portion, self._count)
        if torch.is_grad_enabled() and portion.count != self.call.division.count:
            return self.scorer(portion, self._count)
        start = Start(self.call.named.values(), self.call.options.roster.parts())
        with suppress(torch.OutOfMemoryError):
            return self.scorer(portion, self._count)
        start.put_back()
        return None

    def _may_halve(self, portion: Portion) -> bool:
        """Whether a chunk that runs out of memory may be divided."""
        is_own = self.known is not None and self.ranks is None
        return is_own and not self.call.division.is_stated and portion.count > 1

    def group(self, score: Callable[[], list[Tensor]]) -> Tensor:
        """The predictions `[m, ...]` of the whole group, on every rank.

        Args:
            score: Scores this rank's poses; returns their predictions chunk by chunk.

        Raises:
            ShapeMismatchError: if poses disagree in the shape or dtype of their predictions.
            NonFinitePredictionError: naming every pose whose prediction is nan or infinite.
            NoPosesError: if no rank has poses.
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
        """The result of a rule, once all ranks have applied it."""
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

        An engine's first group is scored with graphs throughout. This reveals results that the
        model caches between poses, which would lose their gradient in silence under no_grad. A few
        graphs are not enough, however alike: a cache has an entry for each pocket, and the last
        pose may be the one that fills the next. So even where light poses share a chunk, each graph
        is walked with a clock of its own.
        """
        first, self._first = self.first(), None
        if first is None:
            return
        yield first
        del first

        def has_graph(portion: Portion) -> bool:
            look = self._is_wary or any(map(is_watched, portion.tensors()))
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
                if not self._may_halve(portion):
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
        """How many more times another rank runs the model than this one, where that matters.

        All ranks join in a forward or backward of a sharded model, so this is asked beforehand.

        Args:
            rounds: How often this rank will run it; default: once for each chunk.

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
        """Raises if gradients are wanted but no scored pose has any.

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
        """As `score_again`, and the predictions of poses scored alone, one by one."""
        leaves: dict[int, Tensor] = {}
        rows: list[Tensor] = []
        clocks: list[int] = []

        def scored(poses: list[Pose], count: int, number: int) -> Tensor:
            own = cut(poses, self.inputs, leaves)
            return self.scorer(Portion(own, count, portion.how), number)

        def score() -> Tensor:
            if portion.how != "alone" or portion.count == 1:
                return scored(portion.poses, portion.count, start)
            for number, pose in enumerate(portion.poses, start):
                if self._is_wary and torch.is_grad_enabled():
                    clocks.append(graph_clock.now())
                rows.append(scored([pose], 1, number))
                check_alike(kind_of(rows[-1]), self._kind or kind_of(rows[0]), number)
            return torch.cat(rows)

        plain = [tensor for tensor in portion.tensors() if not tensor.requires_grad]
        with _flags_kept(plain), graph_clock() as clock:
            predictions = self.inputs.freshness.noting(score)
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
        """Checks a graph made since a given time, and notes what it reaches."""
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
    """Undoes requires_grad_() on the user's poses, which models that compute forces often call."""

    def __init__(self, plain: list[Tensor]) -> None:
        self._plain = plain

    def make(self) -> None:
        pass  # the model does

    def undo(self) -> None:
        for tensor in self._plain:
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)
