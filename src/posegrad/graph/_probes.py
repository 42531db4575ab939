r"""Finds the owner of each row of a cotangent, by probing with powers of two.

Backward is linear, and scaling by a power of two is exact in floating point. Take a backward once
with cotangent 1 for every pose and once with :math:`2^{k_i}` for pose i, the :math:`k_i` distinct.
A row that belongs to pose i alone comes back scaled by exactly :math:`2^{k_i}`, so the exponent
tells the owner, in whatever order, layout or number the rows are. A row that comes back otherwise
mixes poses.

With more poses than exponents, several probes write the pose's number in digits. The exponents
span fewer binary digits than the numbers have: otherwise :math:`2^a + 2^b` would round to a power
of two. Two independent sets of probes (three in half precision) exclude coincidences:
:math:`2^a - 2^b / 3` can be a power of two for one pair of exponents, not for another.

A pose can also hide in the rounding of another whose gradients are larger by as many digits as the
type has; no probe shows it then. So poses that seem to be *faint*, or to own nothing at all, are
differentiated once more by themselves, and everything they reach must be their own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian import NOBODY, Layout

__all__ = ["Probes", "faint_poses", "find_layout", "is_scaled", "make_probes"]

# The lowest exponent and the number of exponents, within the precision and the range of the type.
_RANGE = {
    torch.float64: (-24, 48),
    torch.float32: (-10, 20),
    torch.bfloat16: (-3, 6),
    torch.float16: (0, 8),  # upwards only: downwards, its small numbers would lose digits
}

_SETS, _SETS_IF_NARROW = 2, 3

# A row this much smaller than the largest, and this small, is nobody's: scaling it could lose bits.
_SMALL, _TINY = 2.0**-60, {torch.float64: 2.0**-900}
_DEFAULT_TINY = 2.0**-112

# How far an element may be off, relative to itself, where sums have one order (on a CPU). Elsewhere
# it is `_TOLERANCE`, relative to the largest element of its row.
_ROUNDING = 2.0**-50

# Cotangents are faint if they are smaller than the largest by half of their binary digits, or by
# this many if that is more; those of one class differ by no more. So what hides in the rounding of
# one is small beside the others of its class.
_NARROWEST = 4

_TOLERANCE = {torch.float16: 2.0**-5, torch.bfloat16: 2.0**-4}
_DEFAULT_TOLERANCE = 2.0**-10


@final
@dataclass(frozen=True)
class Probes:
    """Exponents for every pose.

    Args:
        exponents: k, `[P, m]`: one row for each probe.
        tables: For each probe, the digit that each exponent stands for, by exponent - `lowest`.
        places: For each probe, what a one in its digit is worth.
        sets: For each probe, the number of the set it belongs to.
        lowest: The smallest exponent.
        digits: The number of exponents.
    """

    exponents: Tensor
    tables: Tensor
    places: tuple[int, ...]
    sets: tuple[int, ...]
    lowest: int
    digits: int

    def scales(self) -> Iterator[Tensor]:
        """The cotangents of the poses, `[m]`, probe by probe."""
        yield from torch.exp2(self.exponents.double())


def make_probes(count: int, dtype: torch.dtype, generator: torch.Generator) -> Probes:
    """Probes for m poses, with exponents drawn in random order.

    Args:
        count: m.
        dtype: The narrowest dtype of the cotangents.
        generator: The engine's own.
    """
    lowest, digits = _RANGE[dtype]
    length = 1
    while digits**length < count:
        length += 1
    numbers = torch.arange(count, device="cpu")
    exponents, tables, places, sets = [], [], [], []
    for number in range(_SETS if digits > 8 else _SETS_IF_NARROW):
        for digit in range(length):
            order = torch.randperm(digits, generator=generator, device="cpu")
            value = numbers.div(digits**digit, rounding_mode="floor") % digits
            exponents.append(order[value] + lowest)
            tables.append(torch.argsort(order))
            places.append(digits**digit)
            sets.append(number)
    rows = torch.stack(exponents), torch.stack(tables)
    return Probes(*rows, tuple(places), tuple(sets), lowest, digits)


def find_layout(
    base: Tensor, probed: Sequence[Tensor], probes: Probes, count: int
) -> Layout | None:
    """The layout of a cotangent, or None if some row belongs to no single pose.

    Args:
        base: The cotangent under ones.
        probed: The same cotangent under each probe.
        probes: What they were.
        count: m.
    """
    ndim = base.ndim
    if not any(bool(found.any()) for found in (base, *probed)):  # all zero: any layout would do
        return Layout(count, (), torch.full((1,), NOBODY, device=base.device))
    if base.is_complex():
        base, probed = torch.view_as_real(base), [torch.view_as_real(b) for b in probed]
    for dims in _candidates(ndim):
        owners = _owners(base, probed, probes, dims, count)
        if owners is not None:
            return Layout(count, dims, owners)
    return None


def _candidates(ndim: int) -> Iterator[tuple[int, ...]]:
    """Sets of dimensions that may count rows: the first, the whole, others, then several."""
    if ndim:
        yield (0,)
    yield ()
    for size in range(1, min(ndim, 4) + 1):
        yield from (dims for dims in combinations(range(ndim), size) if dims != (0,))


def _owners(
    base: Tensor, probed: Sequence[Tensor], probes: Probes, dims: tuple[int, ...], count: int
) -> Tensor | None:
    """The owners of the rows along some dimensions, or None if they are no rows of single poses."""
    layout = Layout(count, dims, base.new_zeros(0, dtype=torch.long))
    rows = layout.front(base)
    if rows.numel() == 0:
        return torch.full((len(rows),), NOBODY, device=base.device)
    rows = rows.reshape(len(rows), -1)
    size = rows.abs().amax(1)  # [R]
    # Written so that a row of nan counts as alive; it is then found to belong to no single pose.
    tiny = _TINY.get(base.dtype, _DEFAULT_TINY)
    alive = ~(size <= min(tiny, _SMALL * float(size.max()))) & (size != 0)
    answers = [torch.zeros(len(rows), dtype=torch.long, device=base.device)] * (probes.sets[-1] + 1)
    for n, scaled in enumerate(probed):
        digit = _digit(rows, size, layout.front(scaled).reshape(rows.shape), alive, probes, n)
        if digit is None:
            return None
        answers[probes.sets[n]] = answers[probes.sets[n]] + digit * probes.places[n]
    first, *others = (answer[alive] for answer in answers)
    if bool((first >= count).any()) or not all(torch.equal(first, other) for other in others):
        return None
    return torch.where(alive, answers[0], NOBODY)


def _digit(
    rows: Tensor, size: Tensor, other: Tensor, alive: Tensor, probes: Probes, n: int
) -> Tensor | None:
    """The digit probe n gives every row, `[R]`; None if a row was not scaled by one power."""
    scaled = other.abs().amax(1)
    ratio = torch.where(alive, scaled.double() / size.double(), 1)
    exponent = torch.log2(ratio).round()
    place = exponent.nan_to_num(nan=-1e6, posinf=1e6, neginf=-1e6).long() - probes.lowest
    if bool(((place < 0) | (place >= probes.digits))[alive].any()):
        return None
    power = torch.exp2(exponent)
    right = torch.where(
        alive,
        _is_same(other, rows * power.to(rows.dtype).unsqueeze(1), power).all(1),
        scaled <= size.max() * _SMALL * 2.0 ** (probes.lowest + probes.digits),
    )
    if not bool(right.all()):
        return None
    return probes.tables[n].to(rows.device)[place.clamp(0, probes.digits - 1)]


def _is_same(found: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Which elements of rows `[R, ...]` are what they should be; nan never is.

    Each row is judged by itself: beside one that is 1e16 times larger, any other would pass.

    Args:
        found: The rows.
        expected: What they should be.
        scale: How much larger each row is than under cotangent one, `[R]`.
    """
    error, size = (found - expected).abs(), expected.abs()
    if found.device.type == "cpu":  # one order of summation, so equal to the last bit
        tiny = _TINY.get(found.dtype, _DEFAULT_TINY) * scale.to(error.dtype).unsqueeze(1)
        return error <= torch.maximum(_ROUNDING * size, tiny)
    return error <= _TOLERANCE.get(found.dtype, _DEFAULT_TOLERANCE) * size.amax(1, keepdim=True)


def faint_poses(found: Sequence[tuple[Tensor, Layout]], count: int) -> list[Tensor]:
    """Poses whose cotangents are somewhere many digits smaller than those of others, or zero.

    Args:
        found: Cotangents under ones, and whose they are.
        count: m.

    Returns:
        Flags `[m]` for each set of poses that are about equally small somewhere; none if all are
        about equal everywhere. If there are more sets than poses, each such pose is a set instead.
    """
    sets: dict[tuple[bool, ...], None] = {}
    for cotangent, layout in found:
        classes = _classes(cotangent, layout, count)
        sets.update({tuple((classes == n).tolist()): None for n in torch.unique(classes) if n > 0})
    flags = [torch.tensor(own, device="cpu") for own in sets]
    if len(flags) <= count:
        return flags
    return [*torch.eye(count, dtype=torch.bool, device="cpu")[torch.stack(flags).any(0)]]


def _classes(cotangent: Tensor, layout: Layout, count: int) -> Tensor:
    """The class of each pose by the size of its cotangents, `[m]`.

    0 holds the largest; each further class is smaller by the same number of binary digits. Poses
    that own nothing are in class infinity.
    """
    rows, owners = layout.front(cotangent), layout.owners.cpu()
    largest = torch.zeros(count, dtype=torch.float64, device="cpu")
    if rows.numel():
        sizes = rows.reshape(len(rows), -1).abs().amax(1).double().cpu()  # [R]
        live = owners != NOBODY
        largest.scatter_reduce_(0, owners[live], sizes[live], "amax")
    digits = -math.log2(torch.finfo(cotangent.dtype).eps)
    return (-(largest / largest.max()).log2() / max(_NARROWEST, digits / 2)).floor()


def is_scaled(found: Tensor, base: Tensor, layout: Layout, scales: Tensor) -> bool:
    """Whether a cotangent is another with each row multiplied by the number of its owner.

    Args:
        found: The cotangent when the poses' own are these numbers.
        base: The same cotangent under ones.
        layout: Whose its rows are.
        scales: The numbers, `[m]`: zero or powers of two.
    """
    if base.is_complex():
        found, base = torch.view_as_real(found), torch.view_as_real(base)
    rows, other = layout.front(base), layout.front(found)
    if rows.numel() == 0:
        return True
    owners = layout.owners
    each = scales.to(owners.device)[owners.clamp(min=0)].double()  # [R]
    each = torch.where(owners == NOBODY, 0, each)
    rows, other = rows.reshape(len(rows), -1), other.reshape(len(other), -1)
    expected = torch.where(each.unsqueeze(1) == 0, 0, rows * each.to(rows.dtype).unsqueeze(1))
    return bool(_is_same(other, expected, each.clamp(min=1)).all())
