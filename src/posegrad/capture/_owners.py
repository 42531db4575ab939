r"""Whose is each row of a cotangent? Found by probing with powers of two.

Backward is linear, and scaling by a power of two is exact in floating point. Take a backward once
with cotangent 1 for every pose and once with :math:`2^{k_i}` for pose i, the :math:`k_i` distinct.
A row that belongs to pose i alone comes back scaled by exactly :math:`2^{k_i}`, so the exponent
tells the owner, in whatever order, layout or number the rows are. A row that comes back otherwise
mixes poses.

With more poses than exponents, several probes write the pose's number in digits. Two independent
sets of probes exclude coincidences: :math:`2^a - 2^b / 3` can be a power of two for one pair of
exponents, not for another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from posegrad.jacobian import NOBODY, Layout

__all__ = ["Probes", "find_layout", "make_probes"]

_DIGITS = {torch.float16: 8}
_DEFAULT_DIGITS = 60  # exponents -30 to 29 leave 96 powers of two on either side in float32

_TINY = {torch.float16: 2.0**-14}
_DEFAULT_TINY = 2.0**-80  # below, a probe could meet denormal numbers

_TOLERANCE = {torch.float16: 2.0**-5, torch.bfloat16: 2.0**-4}
_DEFAULT_TOLERANCE = 2.0**-10


@dataclass(frozen=True)
class Probes:
    """Exponents for every pose.

    Args:
        exponents: k, `[P, m]`: one row for each probe.
        tables: For each probe the digit each exponent stands for, by exponent + `offset`.
        places: For each probe the value of its digit.
        sets: Number of the set each probe belongs to.
    """

    exponents: Tensor
    tables: Tensor
    places: tuple[int, ...]
    sets: tuple[int, ...]
    digits: int

    def scales(self) -> Iterator[Tensor]:
        """The cotangents of the poses, `[m]`, probe by probe."""
        yield from torch.exp2(self.exponents.double())


def make_probes(count: int, dtype: torch.dtype, generator: torch.Generator, *, sets: int) -> Probes:
    """Probes for m poses, with exponents drawn in random order.

    Args:
        count: m.
        dtype: The narrowest of the cotangents'.
        generator: The engine's own.
        sets: How many independent answers are wanted.
    """
    digits = _DIGITS.get(dtype, _DEFAULT_DIGITS)
    length = 1
    while digits**length < count:
        length += 1
    numbers = torch.arange(count)
    exponents, tables, places, owners = [], [], [], []
    for number in range(sets):
        for digit in range(length):
            order = torch.randperm(digits, generator=generator)
            value = numbers.div(digits**digit, rounding_mode="floor") % digits
            exponents.append(order[value] - digits // 2)
            tables.append(torch.argsort(order))
            places.append(digits**digit)
            owners.append(number)
    return Probes(torch.stack(exponents), torch.stack(tables), tuple(places), tuple(owners), digits)


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
    if not base.is_floating_point():
        return None
    tiny = _TINY.get(base.dtype, _DEFAULT_TINY)
    for dims in _candidates(base.ndim):
        owners = _owners(base, probed, probes, dims, tiny, count)
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
    base: Tensor,
    probed: Sequence[Tensor],
    probes: Probes,
    dims: tuple[int, ...],
    tiny: float,
    count: int,
) -> Tensor | None:
    layout = Layout(count, dims, base.new_zeros(0, dtype=torch.long))
    rows = layout.front(base).flatten(1) if base.ndim > len(dims) else layout.front(base)[:, None]
    size = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))  # [R]
    alive = size > tiny
    answers = [torch.zeros(len(rows), dtype=torch.long, device=base.device)] * (probes.sets[-1] + 1)
    for n, scaled in enumerate(probed):
        other = layout.front(scaled).reshape(rows.shape)
        digit = _digit(rows, size, other, alive, probes.tables[n], tiny, probes.digits)
        if digit is None:
            return None
        which = probes.sets[n]
        answers[which] = answers[which] + digit * probes.places[n]
    if any(not torch.equal(answer[alive], answers[0][alive]) for answer in answers[1:]):
        return None
    if bool((answers[0][alive] >= count).any()):
        return None
    return torch.where(alive, answers[0], NOBODY)


def _digit(
    rows: Tensor,
    size: Tensor,
    other: Tensor,
    alive: Tensor,
    table: Tensor,
    tiny: float,
    digits: int,
) -> Tensor | None:
    """The digit every row was scaled by, `[R]`; None if a row was not scaled by one power."""
    ratio = other.abs().amax(1) / size if rows.shape[1] else size
    exponent = torch.log2(torch.where(alive, ratio, 1).double()).round()
    offset = exponent.long() + digits // 2
    if bool(((offset < 0) | (offset >= digits))[alive].any()):
        return None
    power = torch.exp2(exponent).to(rows.dtype).unsqueeze(1)
    error = (other - rows * power).abs().amax(1) if rows.shape[1] else size
    if rows.device.type == "cpu":  # one order of summation, so equal to the last bit
        allowed = tiny * power.squeeze(1)
    else:
        tolerance = _TOLERANCE.get(rows.dtype, _DEFAULT_TOLERANCE)
        allowed = tolerance * size * power.squeeze(1)
    wrong = torch.where(alive, error > allowed, other.abs().amax(1) > tiny * 2.0**digits)
    if bool(wrong.any()):
        return None
    return table.to(rows.device)[offset.clamp(0, digits - 1)]
