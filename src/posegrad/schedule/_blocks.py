"""Poses in blocks whose Jacobians fit into memory; each block may be gathered several times.

A block is always gathered with the random state and buffers it found the first time, so that its
rows are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from posegrad.errors import ReplayError
from posegrad.jacobian import PoseJacobian, wide
from posegrad.jacobian._record import record
from posegrad.schedule._batch import as_batch
from posegrad.schedule._poses import Pose
from posegrad.schedule._replay import Start

__all__ = ["Blocks", "Gathering"]

_FIRST = 16  # poses that are gathered to measure how much one holds


@final
@record
class Gathering:
    """How some poses are gathered.

    Args:
        gather: From some poses and the number of the first to their Jacobian.
        most: The bytes that a block may hold.
        chunk: How many poses are scored together, if the caller says: blocks end where chunks do.
        note: Notes the current random state and buffers.
    """

    gather: Callable[[Any, int], PoseJacobian]
    most: int
    chunk: int
    note: Callable[[], Start]


@final
class Blocks:
    """Some poses, divided into blocks whose Jacobians hold about equally many bytes.

    Args:
        poses: As users state them.
        start: The number of the first.
        gathering: How they are gathered.

    Attributes:
        count: How many poses there are.
        spans: The numbers of the poses in each block.
    """

    def __init__(self, poses: Iterable[Pose], start: int, gathering: Gathering) -> None:
        self._poses, self._start, self._gathering = _Sliced(poses), start, gathering
        self._read: dict[int, tuple[Start, Tensor]] = {}  # what blocks found, and their predictions
        count, chunk = self._poses.count, gathering.chunk
        self.count = count
        self._few = min(count, -(-_FIRST // chunk) * chunk)
        size = self._few
        if count > size:
            size = gathering.most * size // max(1, self._first[0])
            size = max(1, size // chunk) * chunk
        self._bounds: list[int] = [*range(0, count, max(1, size)), count]
        self.spans = [slice(*ends) for ends in pairwise(self._bounds)]
        self._slices = self._poses.slices([self.size(i) for i in range(len(self.spans))])

    @property
    def largest(self) -> int:
        """How many poses are in the largest block."""
        return max(map(self.size, range(len(self.spans))), default=0)

    def size(self, number: int) -> int:
        """How many poses are in a block."""
        first, last = self._bounds[number : number + 2]
        return last - first

    def bytes_of(self, poses: int) -> int:
        """About how many bytes the Jacobian of so many poses holds."""
        return self._first[0] * poses // self._few

    def bytes_made(self, columns: int) -> int:
        """The size of the products of its rows with those of so many other poses."""
        _, numbers, itemsize = self._first
        return self.count * columns * numbers**2 * itemsize

    def read(self, number: int) -> PoseJacobian:
        """The Jacobian of a block, which nobody else holds."""
        first, gathering = self._start + self.spans[number].start, self._gathering
        now = gathering.note()
        if number not in self._read:
            jacobian = gathering.gather(self._slices[number], first)
            self._read[number] = now, jacobian.predictions
            return jacobian.consumed()
        before, predictions = self._read[number]
        before.put_back()
        try:
            jacobian = gathering.gather(self._slices[number], first)
        finally:
            now.put_back()
        if not torch.allclose(jacobian.predictions, predictions, equal_nan=True):
            raise ReplayError(
                f"Poses {first} to {first + len(predictions) - 1} gave other predictions when they "
                f"were scored once more, for another tile of the Gramian.\n"
                f"They change when they are fetched, or the model depends on something that "
                f"neither its parameters, buffers nor torch's random state hold.\n"
                f"Fix the poses before the call, or use gather(poses).gramian(), which scores each "
                f"once."
            )
        return jacobian.consumed()

    @cached_property
    def _first(self) -> tuple[int, int, int]:
        """For the first poses: the bytes they hold, the numbers in a prediction, and their size."""
        rest = [self.count - self._few] * (self.count > self._few)
        (first, *_) = self._poses.slices([self._few, *rest])
        now = self._gathering.note()
        try:
            jacobian = self._gathering.gather(first, self._start)
        finally:
            now.put_back()
        numbers, own = jacobian.output_shape[1:].numel(), wide(jacobian.predictions[:0])
        return jacobian.held_bytes, numbers, own.element_size()


@final
class _Sliced:
    """Poses that can be sliced: a batch, or a sequence whose slices are fetched when walked."""

    def __init__(self, poses: Iterable[Pose]) -> None:
        self._batch = as_batch(poses)
        is_sequence = hasattr(poses, "__getitem__") and hasattr(poses, "__len__")
        walked: Any = poses if is_sequence else list(poses)
        self._walked = walked
        self.count: int = len(self._walked) if self._batch is None else self._batch.count

    def slices(self, sizes: Sequence[int]) -> list[Any]:
        """Consecutive slices of these sizes, which add up to all."""
        if self._batch is not None:
            return list(self._batch.slices(sizes))
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [
            _Walked(self._walked, end - size, end) for size, end in zip(sizes, ends, strict=True)
        ]


@final
class _Walked:
    """Some poses of a sequence, fetched one by one."""

    def __init__(self, poses: Any, start: int, stop: int) -> None:
        self._poses, self._numbers = poses, range(start, stop)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Pose]:
        return (self._poses[number] for number in self._numbers)
