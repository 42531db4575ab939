"""Jacobians through float16, whose gradients would underflow.

float16 reaches from 6e-8 to 65504. A training step scales its loss so that gradients lie in
between, and divides afterwards. A Jacobian is read before there is a loss to scale, so the reader
does it: the output is multiplied by a power of two, and what was read is divided by it in float32,
which is exact. It is the largest power under which no gradient overflows, less some headroom.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from posegrad._restoring import leaf_hooks_off, ordinary_mode
from posegrad.graph._reading import Parts
from posegrad.jacobian import Backwards, Factors, Part, Purpose, Rows, wide

__all__ = ["Scaling"]

_EXPONENTS = range(-24, 41)
_HEADROOM = 9  # for random weights (up to 5, so 2.3 bits), for probes, and for the next batch
_LOW = 2.0**-4  # the largest gradient may be this small before digits that count are lost


@final
@dataclass
class Scaling:
    """The power of two an engine scales its outputs by.

    Args:
        exponent: The power; None until one was needed.
        level: The largest gradient that was read when it was found.
    """

    exponent: int | None = None
    level: float = 0.0

    def parts(
        self,
        output: Tensor,
        leaves: Mapping[str, Tensor],
        read: Callable[[Tensor], Parts],
        backwards: Backwards,
    ) -> Parts:
        """What `read` finds for an output, with gradients that neither underflow nor overflow.

        Args:
            output: The output; its graph is kept.
            leaves: The parameters, by name.
            read: Reads the parts of an output's Jacobian.
            backwards: Counts the backwards that are not the reader's.

        Note:
            Time: one reading. The first takes seven or eight plain backwards more, to find the
            power; where the size of the gradients has changed much since, these are taken again,
            and then another reading.
        """
        if self.exponent is not None:
            parts = read(self.scaled(output))
            if self._serves(_largest(parts)):
                return _divided(parts, self.exponent)
        found = _greatest_finite(output, list(leaves.values()), backwards)
        exponent = 0 if found is None else found - _HEADROOM
        parts = read(_times(output, exponent))
        if found is not None:  # else gradients are infinite or nan whatever the scale
            self.exponent, self.level = exponent, _largest(parts)
        return _divided(parts, exponent)

    def scaled(self, output: Tensor) -> Tensor:
        """The output as it is read: times the power."""
        return _times(output, self.exponent or 0)

    def _serves(self, largest: float) -> bool:
        return min(_LOW, self.level / 16) <= largest < float("inf")


def _times(output: Tensor, exponent: int) -> Tensor:
    with ordinary_mode(), torch.enable_grad():
        return wide(output) * 2.0**exponent


def _greatest_finite(output: Tensor, leaves: list[Tensor], backwards: Backwards) -> int | None:
    """The greatest k with which nothing overflows if every number of the output has cotangent 2^k.

    Returns:
        None if something overflows, or is nan, even with the least.
    """
    low, high = _EXPONENTS.start, _EXPONENTS.stop
    if not _is_finite(output, leaves, low, backwards):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if _is_finite(output, leaves, middle, backwards) else (low, middle)
        )
    return low


def _is_finite(output: Tensor, leaves: list[Tensor], exponent: int, backwards: Backwards) -> bool:
    backwards.add(Purpose.SCALE)
    scaled = _times(output, exponent)
    with leaf_hooks_off(leaves):
        found = torch.autograd.grad(
            scaled, leaves, torch.ones_like(scaled), retain_graph=True, allow_unused=True
        )
    dense = [g.coalesce().values() if g.is_sparse else g for g in found if g is not None]
    return all(bool(gradient.isfinite().all()) for gradient in dense)


def _largest(parts: Parts) -> float:
    """The largest of all gradients that were read; infinite if one is infinite or nan."""
    sizes = [
        float(gradient.abs().max())
        for own in parts.values()
        for part in own
        for gradient in _gradients(part)
        if gradient.numel()
    ]
    largest = max(sizes, default=0.0)
    return largest if all(size < float("inf") for size in sizes) else float("inf")


def _gradients(part: Part) -> tuple[Tensor, ...]:
    return part.cotangents if isinstance(part, Factors) else tuple(part.held())


def _divided(parts: Parts, exponent: int) -> Parts:
    """The parts of the output itself, in float32 at least."""
    factor = 2.0**-exponent
    done: dict[int, Tensor] = {}  # a weight and its bias share cotangents

    def divided(cotangent: Tensor) -> Tensor:
        if id(cotangent) not in done:
            done[id(cotangent)] = wide(cotangent) * factor
        return done[id(cotangent)]

    def one(part: Part) -> Part:
        if isinstance(part, Factors) and part.pull is None:
            return replace(part, cotangents=tuple(map(divided, part.cotangents)))
        # What is pulled back goes through float16 once more, and is divided after that.
        return Rows(part.path, part.start, part.rows() * factor)

    return {name: [one(part) for part in own] for name, own in parts.items()}
