r"""Joins several uses of a parameter, and several chunks of poses, into one use.

A closed form is a sum over positions, of what its factors and cotangent hold at each. Concatenated,
the positions of several uses are those of one use:

.. math::
    \sum_u \sum_{r \in R_{iu}} b_r a_r^\top = \sum_{r \in \bigcup_u R_{iu}} b_r a_r^\top .

So forms need not know about it: the factors of all uses are concatenated.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch

from posegrad.jacobian._arrangement import Arrangement
from posegrad.jacobian._parts import Factors, Part
from posegrad.jacobian._positions import Positions

__all__ = ["Joining"]

_LATEST = 2  # a weight and its bias share positions


@final
class _Group(NamedTuple):
    """Parts that can be joined.

    Args:
        kind: What they have in common.
        parts: The parts.
        dims: The dimensions of each part that count positions.
    """

    kind: object
    parts: list[Factors]
    dims: list[tuple[int, ...]]


@final
class Joining:
    """Joins the parts of blocks; what neighbouring blocks share is joined once."""

    def __init__(self) -> None:
        self._latest: list[Positions] = []

    def of(self, parts: Sequence[Part], count: int) -> Sequence[Part]:
        """The same rows in as few parts as possible.

        Args:
            parts: The parts of one block.
            count: M, the number of rows in the block.
        """
        groups: list[_Group] = []
        others: list[Part] = []
        for part in parts:
            found = part.opened() if isinstance(part, Factors) and part.pull is None else None
            if found is None or not _is_sorted(found, groups):
                others.append(part)
        for group in groups:
            is_one = len(group.parts) == 1 and group.parts[0].count == count
            arrangement = None if is_one else _arrangement(group.parts, count)
            others += group.parts if arrangement is None else [self._joined(group, arrangement)]
        return others

    def _joined(self, group: _Group, arrangement: Arrangement) -> Part:
        parts = group.parts
        positions = self._positions(group, arrangement)
        each = zip(*(part.form.factors() for part in parts), strict=True)
        factors = [positions.joined([factor.value for factor in uses]) for uses in each]
        form = parts[0].form.of_positions(factors)
        columns = zip(*(part.cotangents for part in parts), strict=True)
        cotangents = tuple([positions.joined(uses) for uses in columns])
        return Factors.direct(form, positions.layout, arrangement, cotangents)

    def _positions(self, group: _Group, arrangement: Arrangement) -> Positions:
        found = Positions(
            [part.layout for part in group.parts],
            [part.start // arrangement.components for part in group.parts],
            [part.cotangents[0].shape for part in group.parts],
            group.dims,
            arrangement.poses,
        )
        found = next((known for known in self._latest if known.key == found.key), found)
        self._latest = [found, *(known for known in self._latest if known is not found)][:_LATEST]
        return found


def _is_sorted(part: Factors, groups: list[_Group]) -> bool:
    """Adds a part to the group of its kind or to a new one; False if it has no positions."""
    dims = part.form.positions
    if not dims:
        return False
    kind = _kind(part, dims)
    group = next((group for group in groups if group.kind == kind), None)
    if group is None and groups and (turned := part.turned()) is not None:
        kind = _kind(turned, dims)
        group = next((group for group in groups if group.kind == kind), None)
        part = part if group is None else turned
    if group is None:
        group = _Group(_kind(part, dims), [], [])
        groups.append(group)
    group.parts.append(part)
    group.dims.append(dims)
    return True


def _kind(part: Factors, dims: tuple[int, ...]) -> object:
    """What parts must agree in to be joined: all but their sizes and positions."""
    form, b = part.form, part.cotangents[0]
    tensors = [*[factor.tensor for factor in form.factors()], b]
    widths = [[n for dim, n in enumerate(t.shape) if dim not in dims] for t in tensors]
    return type(form), form.fixed, dims[0], len(part.cotangents), widths, [t.dtype for t in tensors]


def _arrangement(parts: Sequence[Factors], count: int) -> Arrangement | None:
    """The common arrangement of all parts in the rows; None if they disagree."""
    first = parts[0].arrangement
    if all(part.arrangement == first for part in parts) and parts[0].count == count:
        return first
    kinds = {(part.arrangement.dim, part.arrangement.shape[1:]) for part in parts}
    if first.dim is None and {dim for dim, _ in kinds} == {None}:
        return Arrangement(torch.Size([count]), None)
    if first.dim == 0 and len(kinds) == 1:
        return Arrangement(torch.Size([count // first.components, *first.shape[1:]]), 0)
    return None
