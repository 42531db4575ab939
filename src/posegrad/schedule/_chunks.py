"""Which poses are scored together: slices of a batch, or several walked poses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any, Literal, final

from torch import Tensor

from posegrad.schedule._batch import Batch, as_batch
from posegrad.schedule._poses import Pose, bytes_of, copied, shapes_of, tensors_of

__all__ = [
    "Budget",
    "ChunkSize",
    "Portion",
    "checked",
    "in_chunks",
    "sizes_of",
]


@final
@dataclass(frozen=True)
class Budget:
    """Chunks by the size of their poses, e.g. by atoms, instead of by their number.

    A chunk takes the next poses, in order, as long as their sizes add up to no more than the limit.
    This bounds the memory of a chunk's graph where poses differ in size. A pose larger than the
    limit must still be scored: it becomes a chunk of its own, the only kind that exceeds the
    budget.

    Args:
        limit: The largest total size of a chunk. Positive.
        size: The size of a pose, a number from 0 on in the unit of the limit: atoms, edges, tokens,
            bytes. Called once for each pose, in their order.

    Raises:
        TypeError: if the limit is not a number or `size` not callable; in a call, if a size is not
            a number.
        ValueError: if the limit is not positive; in a call, if a size is negative or nan. Both name
            the pose.

    Example:
        >>> poses = [torch.randn(atoms, 3) for atoms in (5, 9, 6, 30, 7)]
        >>> engine = Engine(
        ...     nn.Linear(3, 1),
        ...     predict=lambda model, batch: model(batch).sum(dim=(1, 2)),
        ...     collate=lambda poses: nn.utils.rnn.pad_sequence(poses, batch_first=True),
        ...     chunk_size=Budget(20, len),  # 5 + 9 + 6, then 30 alone, then 7
        ... )
        >>> engine.plan(poses, Mean()).chunks
        3
    """

    limit: float
    size: Callable[[Pose], float]

    def __post_init__(self) -> None:
        if not isinstance(self.limit, Real) or isinstance(self.limit, bool):
            raise TypeError(
                f"The limit of a Budget is {self.limit!r}, but it must be a number: the largest "
                f"total size of a chunk.\nPass Budget(4096, lambda pose: pose.num_nodes)."
            )
        if not self.limit > 0:
            raise ValueError(
                f"The limit of a Budget is {self.limit}, but no pose fits into a chunk of that "
                f"size.\nPass a positive limit, in the unit of the sizes: Budget(4096, ...)."
            )
        if not callable(self.size):
            raise TypeError(
                f"The size of a Budget is {self.size!r}, but it must be a function from a pose to "
                f"its size.\nPass Budget({self.limit}, lambda pose: pose.num_nodes)."
            )

    def measure(self, pose: Pose, number: int) -> float:
        """The size of a pose, checked; `number` is for error messages.

        Raises:
            TypeError: if it is not a number.
            ValueError: if it is negative or nan.
        """
        try:
            size = self.size(pose)
        except Exception as error:
            error.add_note(f"This was raised by the size of a Budget for pose {number}.")
            raise
        if isinstance(size, Tensor) and size.numel() == 1:
            size = size.item()
        if not isinstance(size, Real) or isinstance(size, bool):
            raise TypeError(
                f"The size of pose {number} is a {type(size).__name__}, but a Budget adds up "
                f"numbers.\nLet its `size` return one, e.g. lambda pose: pose.num_nodes."
            )
        if not size >= 0:
            raise ValueError(
                f"The size of pose {number} is {size}, but sizes are added up to at most "
                f"{self.limit}.\nLet the `size` of the Budget return a number from 0 on."
            )
        return size


ChunkSize = int | Budget | Literal["auto"]
"""How poses are divided into chunks."""


@final
@dataclass(frozen=True)
class Portion:
    """Poses that are scored in one forward.

    Args:
        poses: One by one, or one slice of a batch.
        count: Their number.
        how: What the model is called with: the pose `"alone"`, all of them `"joined"`, or a
            `"slice"` of a batch.
    """

    poses: list[Pose]
    count: int
    how: Literal["alone", "joined", "slice"]

    def copied(self) -> "Portion":
        """A portion with copies of the poses' containers, but not of their tensors."""
        return self.holding([copied(pose) for pose in self.poses])

    def holding(self, poses: list[Pose]) -> "Portion":
        """A portion with other poses in place of these."""
        return Portion(poses, self.count, self.how)

    def tensors(self) -> list[Tensor]:
        """Every tensor in it."""
        return [tensor for pose in self.poses for tensor in tensors_of(pose)]

    def is_ragged(self) -> bool:
        """Whether joined poses differ in shape, so that some may be padded."""
        if self.how != "joined":
            return False
        shapes = map(shapes_of, self.poses)
        first = next(shapes)
        return any(shape != first for shape in shapes)

    def picked(self, numbers: Sequence[int]) -> "Portion":
        """Some of its poses, by their places in it."""
        if self.how != "slice":
            return Portion([self.poses[i] for i in numbers], len(numbers), self.how)
        batch = as_batch(self.poses[0])
        assert batch is not None  # a slice is a batch
        return Portion([batch.picked(numbers)], len(numbers), "slice")

    @classmethod
    def joined(cls, portions: "Sequence[Portion]") -> "Portion":
        """The poses of several portions of one kind, as one."""
        first, *others = portions
        count = sum(portion.count for portion in portions)
        if not others:
            return first
        if first.how != "slice":
            return cls([pose for portion in portions for pose in portion.poses], count, first.how)
        batch = as_batch(first.poses[0])
        assert batch is not None
        return cls([batch.followed_by([o.poses[0] for o in others])], count, "slice")

    def extent(self) -> int:
        """How many bytes the model gets for its poses, counting all as padded if some are."""
        if self.how != "joined":
            return bytes_of(self.tensors())
        return self.count * max(bytes_of(tensors_of(pose)) for pose in self.poses)

    def halves(self) -> "tuple[Portion, Portion]":
        """Its poses in two parts."""
        half = self.count // 2
        sizes = [half, self.count - half]
        if self.how != "slice":
            parts = self.poses[:half], self.poses[half:]
            first, second = (Portion(list(p), len(p), self.how) for p in parts)
            return first, second
        batch = as_batch(self.poses[0])
        assert batch is not None
        one, other = (
            Portion([p], n, "slice") for p, n in zip(batch.parts(sizes), sizes, strict=True)
        )
        return one, other


def checked(chunk_size: Any) -> ChunkSize:
    """Refuses all but a budget, a whole number from 1 and `"auto"`.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(chunk_size, Budget) or chunk_size == "auto":
        return chunk_size  # type: ignore[no-any-return]
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if not whole or chunk_size < 1:
        raise ValueError(
            f"chunk_size is {chunk_size!r}, but it must be a whole number from 1, a Budget, or "
            f"'auto'."
        )
    return chunk_size  # type: ignore[no-any-return]


def sizes_of(batch: Batch, chunk_size: int | Budget) -> list[int]:
    """How many poses of a batch each chunk has; only a budget looks at single poses."""
    if isinstance(chunk_size, Budget):
        poses = (batch.pose(number) for number in range(batch.count))
        return [len(chunk) for chunk in _within(chunk_size, poses)]
    whole, rest = divmod(batch.count, chunk_size)
    return [chunk_size] * whole + [rest] * (rest > 0)


def in_chunks(poses: Iterator[Pose], chunk_size: int | Budget) -> Iterator[list[Pose]]:
    """Consecutive poses, as many together as `chunk_size` says; the last chunk may be shorter."""
    if isinstance(chunk_size, Budget):
        yield from _within(chunk_size, poses)
        return
    while chunk := list(islice(poses, chunk_size)):
        yield chunk


def _within(budget: Budget, poses: Iterator[Pose]) -> Iterator[list[Pose]]:
    chunk: list[Pose] = []
    total: float = 0
    for number, pose in enumerate(poses):
        size = budget.measure(pose, number)
        if chunk and total + size > budget.limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(pose)
        total += size
    if chunk:
        yield chunk
