r"""The Gramian of more rows than fit, for poses that several ranks share.

Each rank gathers its own poses, block by block. It holds one of its blocks while the blocks of all
ranks come by: the owner of the next one gathers it and sends it to all. So with B blocks on each
of P ranks, each rank gathers some :math:`B^2`, a part of what one process would, and computes its
share of the tiles. Tiles across the diagonal mirror each other, so only one of the two is computed;
which one follows from the numbers of its blocks, so that ranks have equal shares.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import NoPosesError, RankError
from posegrad.jacobian import PoseJacobian, agreed
from posegrad.ranks import Ranks
from posegrad.schedule._blocks import Blocks, Gathering
from posegrad.schedule._poses import Pose
from posegrad.schedule._tiles import divided, put

__all__ = ["gramian_of_ranks"]


@final
class _Block(NamedTuple):
    """A block: its rank, its number there, and its rows among all."""

    rank: int
    number: int
    span: slice


@restoring
def gramian_of_ranks(
    poses: Iterable[Pose],
    other: Iterable[Pose] | None,
    gathering: Gathering,
    parameters: Mapping[str, Tensor],
    ranks: Ranks,
    shown: Callable[[int], Callable[[], None]],
) -> Tensor:
    """As `gramian`, for the poses of all ranks, in the order of the ranks; the same on each.

    Args:
        poses: This rank's poses, as users state them; may be empty.
        other: This rank's other poses; None on all ranks if poses meet each other.
        gathering: Makes the Jacobian of some poses.
        parameters: What to differentiate by.
        ranks: The ranks that share the poses.
        shown: Called with the number of blocks that come by; returns a function to call after each.

    Raises:
        NoPosesError: if no rank has poses, or none has others.
        RankError: if ranks disagree, or another one failed.
    """
    sides: list[Blocks] = []

    def told() -> tuple[int, str, list[int], list[int] | None]:
        own, its = divided(poses, other, gathering)
        sides.extend((own, its))
        head = ranks.next_call(), ranks.fingerprint.of(parameters.items())
        return *head, _sizes(own), None if its is own else _sizes(its)

    everyone = ranks.together("divide poses into blocks", told)
    numbers, layouts, rows_of, columns_of = zip(*everyone, strict=True)
    ranks = agreed(ranks, numbers, layouts)
    own, its = sides
    rows, columns = _listed(rows_of), _columns(rows_of, columns_of)
    tiles = _Tiles(own, its, rows, columns, parameters, ranks)
    turns = max(map(len, rows_of))
    done = shown(turns * len(columns))
    for turn in range(turns):
        tiles.run(turn, done)
    return tiles.total()


@final
class _Tiles:
    """The tiles that this rank computes, and the blocks that it gathers for all ranks."""

    def __init__(
        self,
        own: Blocks,
        its: Blocks,
        rows: Sequence[_Block],
        columns: Sequence[_Block],
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
    ) -> None:
        self._own, self._its, self._rows, self._columns = own, its, rows, columns
        self._parameters, self._ranks = parameters, ranks
        self._alike = own is its
        self._held: tuple[_Block, PoseJacobian] | None = None
        self._total = torch.empty(0)

    def run(self, turn: int, done: Callable[[], None]) -> None:
        """Lets all blocks come by that meet the blocks of this number."""
        self._held = None
        rows = [(place, row) for place, row in enumerate(self._rows) if row.number == turn]
        for place, column in enumerate(self._columns):
            if due := [row for at, row in rows if self._is_due(at, place)]:
                self._come_by(column, next((r for r in due if r.rank == self._ranks.own), None))
            done()

    def _come_by(self, column: _Block, mine: _Block | None) -> None:
        """Sends a block to all ranks; this one may multiply a block of its own with it."""
        found: list[bytes] = []

        def gathered() -> None:
            if mine is not None and self._held is None:
                self._held = mine, self._own.read(mine.number)
            if column.rank == self._ranks.own:
                found.append(self._of(column).packed())

        self._ranks.together("gather a block of poses", gathered)
        sent = self._ranks.shared(found.pop() if found else None, column.rank)
        self._ranks.together("multiply rows with rows", lambda: self._meet(mine, column, sent))

    def total(self) -> Tensor:
        """The tiles of all ranks, summed."""
        return self._ranks.added(self._total)

    def _is_due(self, row: int, column: int) -> bool:
        """Whether a tile is computed, not mirrored from another."""
        count = len(self._columns)
        apart = (column - row) % count
        if not self._alike or 2 * apart < count:
            return True
        return 2 * apart == count and row < column

    def _of(self, column: _Block) -> PoseJacobian:
        """One of this rank's blocks."""
        if self._alike and self._held is not None and self._held[0] == column:
            return self._held[1]
        return self._its.read(column.number)

    def _meet(self, mine: _Block | None, column: _Block, sent: bytes) -> None:
        if mine is None and self._total.numel():
            return
        K = PoseJacobian.unpacked(sent, self._parameters).consumed()
        if not self._total.numel():
            self._total = self._zeros(K)
        if mine is None or self._held is None:
            return
        is_same = self._alike and mine == column
        J = self._held[1]
        tile = J.gramian() if is_same else J @ K.T
        put(tile, self._total, mine.span, column.span, mirrored=self._alike)

    def _zeros(self, K: PoseJacobian) -> Tensor:
        own = list(self._parameters.values())
        dtype = reduce(torch.promote_types, [p.dtype for p in own], torch.float32)
        inner = K.output_shape[1:]
        shape = self._rows[-1].span.stop, *inner, *reversed(inner), self._columns[-1].span.stop
        return torch.zeros(shape, dtype=dtype, device=own[0].device)


def _sizes(blocks: Blocks) -> list[int]:
    return [blocks.size(number) for number in range(len(blocks.spans))]


def _listed(sizes_of: Sequence[Sequence[int]]) -> list[_Block]:
    """All blocks, rank by rank."""
    whose = [(rank, number) for rank, sizes in enumerate(sizes_of) for number in range(len(sizes))]
    if not whose:
        raise NoPosesError(
            "No rank has poses, so there are no rows to multiply.\nLeave empty groups out, on all "
            "ranks."
        )
    bounds = accumulate((size for sizes in sizes_of for size in sizes), initial=0)
    return [_Block(*one, slice(*ends)) for one, ends in zip(whose, pairwise(bounds), strict=True)]


def _columns(
    rows_of: Sequence[Sequence[int]], columns_of: Sequence[Sequence[int] | None]
) -> list[_Block]:
    """The blocks that the rows meet."""
    given = [sizes for sizes in columns_of if sizes is not None]
    if not given:
        return _listed(rows_of)
    if len(given) < len(columns_of):
        without = [rank for rank, sizes in enumerate(columns_of) if sizes is None]
        raise RankError(
            f"Ranks {without} passed no others to meet their poses, the rest did: the ranks make "
            f"one product, J @ K.T or the Gramian.\nPass others on all ranks, an empty list where "
            f"there are none, or on no rank."
        )
    return _listed(given)
