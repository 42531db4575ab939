r"""Random projections in factored form.

A parameter is viewed as a matrix `[p, d]`, and its gradient g is projected from both sides,

.. math:: \frac{1}{\sqrt{k l}}\, P g Q^\top, \qquad P \in \{\pm 1\}^{k \times p},
    Q \in \{\pm 1\}^{l \times d},

so that for a sum of outer products only the factors are projected: :math:`\sum_r (P b_r)
(Q a_r)^\top`. A vector is folded into a matrix, as square as its length allows.
"""

import hashlib
from functools import cache
from math import isqrt
from typing import final

import torch
from torch import Tensor

__all__ = ["Projection"]

_BITS = 8  # signs taken from each whole number


@final
class Projection:
    """The random signs for one parameter.

    They come from whole numbers drawn on the CPU, seeded by the seed and the parameter's name. So
    they are the same on every machine, whatever other parameters there are.

    Args:
        width: The number of columns of the projected rows.
        seed: Any whole number.
        name: The parameter's name.
        like: A tensor of the signs' dtype and device.
    """

    def __init__(self, width: int, seed: int, name: str, like: Tensor) -> None:
        self.width = width
        self._key, self._like = f"{seed} {name}", like

    def sides(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """P `[k, p]` and Q `[l, d]`, both scaled, for a parameter of that shape."""
        p, d = (shape[0], shape[1:].numel()) if len(shape) > 1 else factored(shape.numel())
        k, l = factored(self.width)  # noqa: E741, as in the formula
        return self._signs("left", k, p), self._signs("right", l, d)

    def of_rows(self, rows: Tensor) -> Tensor:
        """From rows `[M, *shape]` to projected ones, `[M, k, l]`."""
        left, right = self.sides(rows.shape[1:])
        height, length = left.shape[1], right.shape[1]
        rows = rows.reshape(len(rows), height, length).to(left.dtype)
        return left @ (rows @ right.mT)

    def _signs(self, side: str, count: int, length: int) -> Tensor:
        digest = hashlib.sha256(f"{self._key} {side}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
        numbers = count * length
        words = torch.randint(2**_BITS, (-(-numbers // _BITS),), generator=generator)
        signs = _signs_of_words().to(self._like)[words.to(self._like.device)].reshape(-1)[:numbers]
        return signs.mul_(count**-0.5).reshape(count, length)


@cache
def _signs_of_words() -> Tensor:
    """The signs that the bits of each whole number encode, `[2^bits, bits]`."""
    bits = (torch.arange(2**_BITS).unsqueeze(1) >> torch.arange(_BITS)) & 1
    return 2.0 * bits - 1.0


def factored(width: int) -> tuple[int, int]:
    """The two factors of a width that are closest to each other, the smaller first."""
    small = next(k for k in range(isqrt(width), 0, -1) if width % k == 0)
    return small, width // small
