r"""Several uses of a parameter as one, and several chunks of poses.

A closed form is a sum over positions, of what its factors and the cotangent hold at each. The
positions of several uses, one after another, are those of one use:

.. math::
    \sum_u \sum_{r \in R_{iu}} b_r a_r^\top = \sum_{r \in \bigcup_u R_{iu}} b_r a_r^\top .

So forms need to know nothing of it: the factors of all uses, concatenated, are those of one.
"""

from collections.abc import Sequence
from typing import final

import torch

from posegrad.jacobian._arrangement import Arrangement
from posegrad.jacobian._parts import Factors, Part
from posegrad.jacobian._positions import Positions

__all__ = ["Joining"]

_LATEST = 4  # weight and bias have cotangents in common, projections of one tensor their input


@final
class Joining:
    """Joins the parts of blocks; what neighbouring blocks have in common is joined once."""

    def __init__(self) -> None:
        self._latest: list[Positions] = []

    def of(self, parts: Sequence[Part], count: int) -> Sequence[Part]:
        """The same rows in as few parts as can be.

        Args:
            parts: Of one block.
            count: M, the number of its rows.
        """
        groups: list[tuple[object, list[Factors]]] = []
        others: list[Part] = []
        for part in parts:
            part = part.opened() if isinstance(part, Factors) else part
            if isinstance(part, Factors) and part.pull is None and part.form.positions:
                _sort(part, groups)
            else:
                others.append(part)
        for _, group in groups:
            arrangement = _arrangement(group, count)
            others += group if arrangement is None else [self._joined(group, arrangement)]
        return others

    def _joined(self, parts: Sequence[Factors], arrangement: Arrangement) -> Part:
        positions = self._positions(parts, arrangement)
        each = zip(*(part.form.factors() for part in parts), strict=True)
        factors = [positions.joined([factor.value for factor in uses]) for uses in each]
        form = parts[0].form.of_positions(factors)
        columns = zip(*(part.cotangents for part in parts), strict=True)
        cotangents = tuple(positions.joined(uses) for uses in columns)
        return Factors.direct(form, positions.layout, arrangement, cotangents)

    def _positions(self, parts: Sequence[Factors], arrangement: Arrangement) -> Positions:
        found = Positions(
            [part.layout for part in parts],
            [part.start // arrangement.components for part in parts],
            [part.cotangents[0].shape for part in parts],
            [part.form.positions for part in parts],
            arrangement.poses,
        )
        found = next((known for known in self._latest if known.is_like(found)), found)
        self._latest = [found, *(known for known in self._latest if known is not found)][:_LATEST]
        return found


def _sort(part: Factors, groups: list[tuple[object, list[Factors]]]) -> None:
    """Adds a part to the group of its kind, or to a new one."""
    kind = _kind(part)
    for known, group in groups:
        if known == kind:
            group.append(part)
            return
    turned = part.turned() if groups else None
    if turned is not None:
        other = _kind(turned)
        for known, group in groups:
            if known == other:
                group.append(turned)
                return
    groups.append((kind, [part]))


def _kind(part: Factors) -> object:
    """What parts that can be joined have in common: all but their numbers and positions."""
    form = part.form
    tensors = [*[factor.tensor for factor in form.factors()], part.cotangents[0]]
    inner = [(_but(tensor.shape, form.positions), tensor.dtype) for tensor in tensors]
    return type(form), form.fixed, form.positions[0], len(part.cotangents), inner


def _but(shape: torch.Size, dims: tuple[int, ...]) -> list[int]:
    return [size for dim, size in enumerate(shape) if dim not in dims]


def _arrangement(parts: Sequence[Factors], count: int) -> Arrangement | None:
    """How poses and components of all parts number the rows; None if they disagree."""
    first = parts[0].arrangement
    if all(part.arrangement == first and part.count == count for part in parts):
        return first
    kinds = {(part.arrangement.dim, part.arrangement.shape[1:]) for part in parts}
    if first.dim is None and {dim for dim, _ in kinds} == {None}:
        return Arrangement(torch.Size([count]), None)
    if first.dim == 0 and len(kinds) == 1:
        return Arrangement(torch.Size([count // first.components, *first.shape[1:]]), 0)
    return None
