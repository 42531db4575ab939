"""Divides the poses of a call into chunks that are scored together."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from math import ceil, inf, isinf
from typing import Literal, final

from posegrad.schedule._batch import Batch
from posegrad.schedule._chunks import ChunkSize, Portion, in_chunks, sizes_of
from posegrad.schedule._memory import Known
from posegrad.schedule._poses import Pose, bytes_of, tensors_of

__all__ = ["Ahead", "Division", "Sliced", "Walked", "sliced"]

_GUESSED = 2**12  # bytes of a graph for each byte of a pose, assumed until measured

_AT_MOST = 2**16  # the most of these bytes: a batch that fits even so is scored whole, unmeasured

_LIGHT = 2**17  # bytes of the graphs in one chunk of poses that are walked alone


class Division(ABC):
    """Poses in chunks.

    Args:
        known: What is known of poses like these.
        is_stated: Whether the caller has said how many poses are scored together.
    """

    count: int | None
    """m, if the poses have a length."""

    one_chunk: bool
    """Whether all poses are scored together."""

    is_empty: bool
    """Whether there are no poses."""

    walked: bool
    """Whether each pose is a forward of its own."""

    whole = False
    """Whether all poses could be scored together, though smaller chunks are fast enough."""

    def __init__(self, known: Known, *, is_stated: bool) -> None:
        self.known = known
        self.is_stated = is_stated

    @property
    def is_measured(self) -> bool:
        """Whether measurements may decide; a caller who states chunks wants the same bits."""
        return self.known.measure is not None and not self.is_stated

    @property
    def may_overrun(self) -> bool:
        """Whether a chunk may run out of memory, so that it must be possible to halve it.

        Not if the caller states chunks, nor if all graphs take less than 1 % of the budget.
        """
        graph = self.graph()
        poses = (self.count or 1) if self.one_chunk or self.whole else self.together()
        some = graph is None or graph * poses > self.known.budget / 100
        return some and not self.is_stated

    @abstractmethod
    def portions(
        self, *, light: bool = False, whole: bool = False, reserved: float = 0.0
    ) -> Iterator[Portion]:
        """The portions to score, one forward each; may be iterated once.

        Args:
            light: Whether walked poses with small graphs may share a chunk: the fixed time of a
                chunk would exceed theirs.
            whole: Whether all poses are one chunk, where they may be.
            reserved: The bytes kept beside the graphs.
        """

    @abstractmethod
    def together(self) -> int:
        """About how many poses a chunk has."""

    @abstractmethod
    def chunks(self) -> int:
        """About how many chunks poses that have a length make. May consume the poses."""

    @abstractmethod
    def graph(self) -> float | None:
        """The bytes of a pose's graph, if measured."""


@final
class Sliced(Division):
    """A batch, in slices.

    Args:
        batch: The batch.
        chunk_size: As the caller stated it.
        known: What is known of poses like these.
        measures: Whether graphs are measured; those of sharded models are not.
    """

    def __init__(
        self, batch: Batch, chunk_size: ChunkSize, known: Known, *, measures: bool
    ) -> None:
        super().__init__(known, is_stated=chunk_size != "auto")
        self._batch = batch
        self._bytes = batch.bytes()
        self.count = batch.count
        self._sizes: list[int] | None
        if chunk_size != "auto":
            self._sizes = sizes_of(batch, chunk_size)
        elif self._is_unknown() and measures:
            self._sizes = None
        else:
            self._sizes = self._fitting(0)
        self.one_chunk = self._sizes is not None and len(self._sizes) == 1
        self.whole = not (self.one_chunk or self.is_stated) and self._fits()
        self.is_empty = not batch.count
        self.walked = False

    def portions(
        self, *, light: bool = False, whole: bool = False, reserved: float = 0.0
    ) -> Iterator[Portion]:
        if self.one_chunk or (whole and self.whole):
            yield Portion([self._batch.poses], self._batch.count, "slice")
            return
        if self._sizes is not None:
            again = reserved and not self.is_stated
            yield from sliced(self._batch, self._fitting(0, reserved) if again else self._sizes)
            return
        yield next(sliced(self._batch, [1, self._batch.count - 1]))  # which is measured
        sizes = [1, *self._fitting(1, reserved)]
        yield from islice(sliced(self._batch, sizes), 1, None)

    def together(self) -> int:
        return max(self._planned(), default=1)

    def chunks(self) -> int:
        return len(self._planned())

    def graph(self) -> float | None:
        measure = self.known.measure
        return None if measure is None else measure.graph_of(self._pose())

    def _fits(self) -> bool:
        """Whether all poses fit together, by measurement."""
        graph, most = self.graph(), self.known.most
        fits = graph is not None and graph * self._batch.count <= self.known.budget
        return fits and (most is None or self._batch.count <= most)

    def _planned(self) -> list[int]:
        return self._fitting(0) if self._sizes is None else self._sizes

    def _pose(self) -> float:
        """The mean bytes of a pose."""
        return self._bytes / max(1, self._batch.count)

    def _is_unknown(self) -> bool:
        """Whether nothing tells that all poses fit."""
        most = self._bytes * _AT_MOST
        return self._batch.count > 1 and self.known.measure is None and most > self.known.budget

    def _fitting(self, start: int, reserved: float = 0.0) -> list[int]:
        """The sizes of as few chunks as fit, for the poses from `start` on."""
        count, budget = self._batch.count - start, max(1.0, self.known.budget - reserved)
        graph = self.graph()
        measured = graph is not None and not isinf(self.known.worth(graph))
        if graph is None and not self._is_unknown():
            return [count] * (count > 0)
        graph = max(1.0, _GUESSED * self._pose() if graph is None else graph)
        most = min(count, self.known.most or count)
        enough = max(1, ceil(self.known.worth(graph))) if measured else count
        if count <= min(most, enough) and self._bytes and graph * self._batch.count <= budget:
            return [count] * (count > 0)
        most = min(most, enough)
        if (extents := self._batch.extents()) is not None:
            share = graph * len(extents) / max(1e-9, sum(extents))
            return _greedy([extent * share for extent in extents[start:]], budget, most)
        return _even(count, min(most, max(1, int(budget // graph))))


@final
class Walked(Division):
    """Poses that come one by one.

    Args:
        poses: The poses.
        chunk_size: As the caller stated it.
        known: What is known of poses like the first.
        joins: Whether poses are joined for the model, even a single one.
    """

    def __init__(self, poses: "Ahead", chunk_size: ChunkSize, known: Known, *, joins: bool) -> None:
        super().__init__(known, is_stated=chunk_size != "auto")
        self.count = poses.count
        self.is_empty = poses.first is poses.none
        self.walked = not joins
        self._poses = poses
        self._size = chunk_size
        self._reserved = 0.0
        self._count: int | None = None
        self._how: Literal["joined", "alone"] = "joined" if joins else "alone"
        self._first = 0 if self.is_empty else self._pose(poses.taken())
        if self.is_stated or joins:
            walk = self._walk(light=False)
            opening = list(islice(walk, 2))
            self._walked: Iterator[Portion] | None = chain(opening, walk)
            self._opening = opening[0].count if opening else 1
            self.one_chunk = len(opening) == 1
        else:
            self._walked, self._opening = None, 1
            self.one_chunk = poses.is_one

    def portions(
        self, *, light: bool = False, whole: bool = False, reserved: float = 0.0
    ) -> Iterator[Portion]:
        self._reserved = reserved
        return self._walk(light=light) if self._walked is None else self._walked

    def together(self) -> int:
        if self._walked is not None:
            return self._opening
        graph = self.graph()
        if graph is None:
            return 1
        return max(1, int(min(self.known.budget, _LIGHT) // max(1.0, graph)))

    def chunks(self) -> int:
        if self._walked is None:
            return -(-(self.count or 0) // self.together())
        if self._count is None:
            self._count = sum(1 for _ in self._walked)
        return self._count

    def graph(self) -> float | None:
        measure = self.known.measure
        return measure.graph_of(self._first) if measure is not None and self._first else None

    def _walk(self, *, light: bool) -> Iterator[Portion]:
        if self._size != "auto":
            chunks = in_chunks(self._poses, self._size)
        else:
            chunks = self._fitting(light=light)
        for chunk in chunks:
            yield Portion(chunk, len(chunk), self._how)

    def _fitting(self, *, light: bool) -> Iterator[list[Pose]]:
        """As many poses together as fit; the first alone, to be measured."""
        joined = self._how == "joined"
        if not (light or joined):
            yield from ([pose] for pose in self._poses)
            return
        budget = max(1.0, self.known.budget - self._reserved)
        limit = budget if joined else min(budget, _LIGHT)
        chunk: list[Pose] = []
        total = 0.0
        for pose in self._poses:
            graph = self._graph(pose, limit)
            if chunk and (total + graph > limit or len(chunk) == self._most(graph)):
                yield chunk
                chunk, total = [], 0.0
                graph = self._graph(pose, limit)  # may have been measured meanwhile
            chunk.append(pose)
            total += graph
            if total >= limit:  # a full chunk goes at once, before a generator is asked for more
                yield chunk
                chunk, total = [], 0.0
        if chunk:
            yield chunk

    def _most(self, graph: float) -> float:
        """How many poses with such graphs are fast enough, and allowed, in one chunk."""
        return min(self.known.most or inf, max(1, ceil(min(self.known.worth(graph), 2**40))))

    def _graph(self, pose: Pose, limit: float) -> float:
        """The bytes of a pose's graph; the limit if unknown."""
        measure = self.known.measure
        size = 0 if measure is None else self._pose(pose)
        return limit if measure is None or not size else measure.graph_of(size)

    @staticmethod
    def _pose(pose: Pose) -> int:
        return bytes_of(tensors_of(pose))


@final
class Ahead(Iterator[Pose]):
    """An iterator over poses of any kind that can look at the first in advance.

    Args:
        poses: As users state them.

    Attributes:
        count: How many there are, if the poses have a length.
        none: Stands for no pose.
        first: The first pose, or `none`; dropped once it is `taken`.
        is_one: Whether there is exactly one pose.
    """

    none = object()

    def __init__(self, poses: Iterable[Pose]) -> None:
        self.count = len(poses) if isinstance(poses, Sized) else None
        rest = iter(poses)
        opening = list(islice(rest, 2))
        self.first = opening[0] if opening else self.none
        self.is_one = len(opening) == 1
        self._rest = chain(opening, rest)

    def taken(self) -> Pose:
        """The first pose, which is then let go."""
        first, self.first = self.first, self.none
        return first

    def __next__(self) -> Pose:
        return next(self._rest)


def sliced(batch: Batch, sizes: Sequence[int]) -> Iterator[Portion]:
    """A batch in slices of the given sizes."""
    for piece, size in zip(batch.slices(sizes), sizes, strict=True):
        yield Portion([piece], size, "slice")


def _even(count: int, most: int) -> list[int]:
    """As few chunks as possible of at most `most` poses, of nearly equal size."""
    if not count:
        return []
    chunks = -(-count // most)
    least, larger = divmod(count, chunks)
    return [least + 1] * larger + [least] * (chunks - larger)


def _greedy(graphs: Sequence[float], budget: float, most: int) -> list[int]:
    """Chunks of consecutive poses whose graphs add up to no more than the budget."""
    sizes: list[int] = []
    total = budget  # starts a new chunk
    for graph in graphs:
        if total + graph > budget or sizes[-1] == most:
            sizes.append(0)
            total = 0.0
        sizes[-1] += 1
        total += graph
    return sizes
