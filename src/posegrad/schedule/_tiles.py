r"""The Gramian of more rows than fit, a tile of it at a time.

The poses are divided into blocks, and a tile :math:`J_a J_b^\top` is the product of two of them.
Rows are gathered again for every tile, but for the block that the last tile leaves: the next row of
tiles begins where the last one ended. So of B blocks, against themselves, some
:math:`B^2 / 2` are gathered, and no more than two are held. A block that is gathered again finds
the random state and the buffers that it found the first time, so that its rows are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import NoPosesError, ReplayError
from posegrad.jacobian import PoseJacobian
from posegrad.schedule._batch import as_batch
from posegrad.schedule._poses import Pose
from posegrad.schedule._replay import Start

__all__ = ["Gather", "gramian"]

Gather = Callable[[Any, int], PoseJacobian]
"""From some poses and the number of the first to their Jacobian."""

_FIRST = 16  # poses that are gathered to see what one holds


@final
class _Blocks:
    """Some poses, divided into blocks whose Jacobians hold about as many bytes.

    Args:
        poses: As users state them.
        start: The number of the first.
        gather: Makes the Jacobian of a block.
        most: The bytes.
        chunk: How many poses are scored together, if that is stated: blocks end where chunks do.
        note: Notes the random state and the buffers as they are.

    Raises:
        NoPosesError: if there are none.
    """

    def __init__(
        self,
        poses: Iterable[Pose],
        start: int,
        gather: Gather,
        most: int,
        chunk: int,
        note: Callable[[], Start],
    ) -> None:
        self._poses, self._start, self._gather, self._note = _Sliced(poses), start, gather, note
        self._read: dict[int, tuple[Start, Tensor]] = {}  # what blocks found, and what they gave
        count = self.count = self._poses.count
        if not count:
            raise NoPosesError(
                "There are no poses, so there are no rows to multiply.\nLeave empty groups out."
            )
        size = min(count, -(-_FIRST // chunk) * chunk)
        if count > size:
            (first, *_) = self._poses.slices([size, count - size])
            now = note()
            try:
                size = most * size // max(1, gather(first, start).held_bytes)
            finally:
                now.put_back()
            size = max(1, size // chunk) * chunk
        bounds = [*range(0, count, size), count]
        self.spans = [slice(*ends) for ends in pairwise(bounds)]
        self._slices = self._poses.slices([stop - start for start, stop in pairwise(bounds)])

    def read(self, number: int) -> PoseJacobian:
        """The Jacobian of a block, which nobody else sees."""
        first = self._start + self.spans[number].start
        now = self._note()
        if number not in self._read:
            jacobian = self._gather(self._slices[number], first)
            self._read[number] = now, jacobian.predictions
            return jacobian.consumed()
        before, predictions = self._read[number]
        before.put_back()
        try:
            jacobian = self._gather(self._slices[number], first)
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


@final
class _Sliced:
    """Poses that can be sliced: a batch, or a sequence of which a slice is fetched when walked."""

    def __init__(self, poses: Iterable[Pose]) -> None:
        self._batch = as_batch(poses)
        is_sequence = hasattr(poses, "__getitem__") and hasattr(poses, "__len__")
        walked: Any = poses if is_sequence else list(poses)
        self._walked = walked
        self.count: int = len(self._walked) if self._batch is None else self._batch.count

    def slices(self, sizes: Sequence[int]) -> list[Any]:
        """The slices of these sizes, one after another, which add up to all."""
        if self._batch is not None:
            return list(self._batch.slices(sizes))
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [
            _Walked(self._walked, end - size, end) for size, end in zip(sizes, ends, strict=True)
        ]


@final
class _Walked:
    """Some of a sequence's poses, fetched one by one."""

    def __init__(self, poses: Any, start: int, stop: int) -> None:
        self._poses, self._numbers = poses, range(start, stop)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Pose]:
        return (self._poses[number] for number in self._numbers)


@restoring
def gramian(
    poses: Iterable[Pose],
    other: Iterable[Pose] | None,
    gather: Gather,
    most: int,
    chunk: int,
    note: Callable[[], Start],
) -> Tensor:
    """The inner products of the rows of some poses with each other, or with those of others.

    Args:
        poses: As users state them.
        other: Others; their numbers follow those of the poses.
        gather: Makes the Jacobian of some of them.
        most: The bytes that a block may hold.
        chunk: As for `_Blocks`.
        note: Likewise.

    Returns:
        As `Jacobian.gramian`, or as `J @ K.T`.
    """
    own = _Blocks(poses, 0, gather, most, chunk, note)
    its = own if other is None else _Blocks(other, own.count, gather, most, chunk, note)
    total = torch.empty(0)
    held: dict[tuple[_Blocks, int], PoseJacobian] = {}
    for row, column in _tiles(len(own.spans), None if other is None else len(its.spans)):
        wanted = (own, row), (its, column)
        held = {key: jacobian for key, jacobian in held.items() if key in wanted}
        for blocks, number in wanted:
            if (blocks, number) not in held:
                held[blocks, number] = blocks.read(number)
        J, K = (held[key] for key in wanted)  # let go of below, before others are read
        tile = J.gramian() if J is K else J @ K.T  # [c, ..., c']
        if not total.numel():
            total = tile.new_empty(own.count, *tile.shape[1:-1], its.count)
        total[own.spans[row], ..., its.spans[column]] = tile
        if own is its and J is not K:
            total[own.spans[column], ..., own.spans[row]] = tile.permute(*range(tile.ndim)[::-1])
        del J, K
    return total


def _tiles(rows: int, columns: int | None) -> Iterator[tuple[int, int]]:
    """The tiles, each of which has a block in common with the one before.

    Args:
        rows: How many blocks there are.
        columns: How many others; None if they are the same, and half of the tiles will do.
    """
    if columns is None:
        for row in range(rows):
            yield row, row
            yield from ((row, column) for column in range(rows - 1, row, -1))
        return
    for row in range(rows):
        turn = range(columns) if row % 2 == 0 else range(columns - 1, -1, -1)
        yield from ((row, column) for column in turn)
