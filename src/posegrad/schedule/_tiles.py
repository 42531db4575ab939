r"""The Gramian of more rows than fit, computed tile by tile.

The poses are divided into blocks, and a tile :math:`J_a J_b^\top` is the product of two. Rows are
gathered again for every tile, except for the block shared with the last tile: each row of tiles
begins where the one before ended. So for B blocks against themselves, some :math:`B^2 / 2` are
gathered, and no more than two are held.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import NoPosesError
from posegrad.jacobian import PoseJacobian
from posegrad.schedule._blocks import Blocks, Gathering
from posegrad.schedule._poses import Pose
from posegrad.schedule._tiles_plan import GramianPlan

__all__ = ["divided", "gramian", "planned", "put"]

Key = tuple[bool, int]
"""Whether a block is of the others, and its number."""


def divided(
    poses: Iterable[Pose], other: Iterable[Pose] | None, gathering: Gathering
) -> tuple[Blocks, Blocks]:
    """The blocks of some poses, and of the poses they meet: themselves, if there are no others.

    Others are numbered after the poses.
    """
    own = Blocks(poses, 0, gathering)
    return own, own if other is None else Blocks(other, own.count, gathering)


@restoring
def gramian(
    poses: Iterable[Pose],
    other: Iterable[Pose] | None,
    gathering: Gathering,
    shown: Callable[[int], Callable[[], None]],
) -> Tensor:
    """The inner products of the rows of poses with each other, or with those of other poses.

    Args:
        poses: As users state them.
        other: The other poses, if any.
        gathering: Makes the Jacobian of some of them.
        shown: Called with the number of gathers; returns a function to call after each.

    Returns:
        As `Jacobian.gramian`, or as `J @ K.T`.

    Raises:
        NoPosesError: if there are no poses, or no others.
    """
    sides = own, its = divided(poses, other, gathering)
    _check_some(own, its)
    done = shown(_gathers(own, its))
    total = torch.empty(0)
    held: dict[Key, PoseJacobian] = {}
    for row, column in _met(own, its):
        held = {key: jacobian for key, jacobian in held.items() if key in (row, column)}
        for key in (row, column):
            if key not in held:
                held[key] = sides[key[0]].read(key[1])
                done()
        J, K = held[row], held[column]  # dropped below, before others are read
        tile = J.gramian() if J is K else J @ K.T  # [c, ..., c']
        if not total.numel():
            total = tile.new_empty(own.count, *tile.shape[1:-1], its.count)
        put(tile, total, own.spans[row[1]], its.spans[column[1]], mirrored=own is its)
        del J, K
    return total


def put(tile: Tensor, into: Tensor, rows: slice, columns: slice, *, mirrored: bool) -> None:
    """Writes a tile to its place and, if mirrored, to the one across the diagonal."""
    into[rows, ..., columns] = tile
    if mirrored and rows != columns:
        into[columns, ..., rows] = tile.permute(*range(tile.ndim)[::-1])


@restoring
def planned(
    poses: Iterable[Pose], other: Iterable[Pose] | None, gathering: Gathering
) -> GramianPlan:
    """What `gramian` would do.

    Raises:
        NoPosesError: if there are no poses, or no others.
    """
    own, its = divided(poses, other, gathering)
    _check_some(own, its)
    return GramianPlan(
        poses=own.count,
        others=None if its is own else its.count,
        blocks=len(own.spans),
        blocks_of_others=None if its is own else len(its.spans),
        largest=max(own.largest, its.largest),
        gathers=_gathers(own, its),
        scored=sum((own, its)[side].size(number) for side, number in _reads(own, its)),
        bytes_held=own.bytes_of(own.largest) + (its.bytes_of(its.largest) if its.count else 0),
        bytes_made=own.bytes_made(its.count),
    )


def _check_some(own: Blocks, its: Blocks) -> None:
    if not own.count or not its.count:
        raise NoPosesError(
            "There are no poses, so there are no rows to multiply.\nLeave empty groups out."
        )


def _gathers(own: Blocks, its: Blocks) -> int:
    return sum(1 for _ in _reads(own, its))


def _reads(own: Blocks, its: Blocks) -> Iterator[Key]:
    """The blocks to gather, in order."""
    held: set[Key] = set()
    for wanted in _met(own, its):
        held &= set(wanted)
        for key in wanted:
            if key not in held:
                held.add(key)
                yield key


def _met(own: Blocks, its: Blocks) -> Iterator[tuple[Key, Key]]:
    """The two blocks of each tile."""
    columns = None if its is own else len(its.spans)
    for row, column in _tiles(len(own.spans), columns):
        yield (False, row), (columns is not None, column)


def _tiles(rows: int, columns: int | None) -> Iterator[tuple[int, int]]:
    """The tiles, each sharing a block with the one before.

    Args:
        rows: How many blocks there are.
        columns: How many others; None if they are the same, when half of the tiles will do.
    """
    if columns is None:
        for row in range(rows):
            yield row, row
            yield from ((row, column) for column in range(rows - 1, row, -1))
        return
    for row in range(rows):
        turn = range(columns) if row % 2 == 0 else range(columns - 1, -1, -1)
        yield from ((row, column) for column in turn)
