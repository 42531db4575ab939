"""Detects products, and factors of products, that exceed the range of float32."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from posegrad.jacobian._block import Block
from posegrad.jacobian._parts import Factors

__all__ = ["left_range", "products_left_range"]

_LIMITS = torch.finfo(torch.float32)
_LOWEST, _HIGHEST = _LIMITS.tiny / _LIMITS.eps**2, _LIMITS.max


def left_range(squares: Tensor, blocks: Iterable[Block]) -> bool:
    """Whether squared norms, in half or float32, overflowed or underflowed (masked zeros aside).

    A clash of atoms in one pose may give a gradient of 1e20. Norms are also taken from products of
    factors, of 1e-21 and 1e18, say, whose squares float32 cannot hold.

    Args:
        squares: `[M]`.
        blocks: The rows of these norms.
    """
    if not squares.numel():
        return False
    blocks = list(blocks)
    lowest = _lowest(_peak(blocks) ** 2)
    low, high = squares.aminmax()
    if float(low) >= lowest and float(high) <= _HIGHEST:
        return False
    outside = ~((squares >= lowest) & (squares <= _HIGHEST))  # nan too
    parts = [(block, part) for block in blocks for part in block.parts]
    if not any(_is_narrow(tensor) for _, part in parts for tensor in part.held()):
        return False
    live = (block.live() for block, _ in parts)  # masked poses have norms of zero
    return any(bool((outside & rows).any()) for rows in live)


def products_left_range(
    products: Tensor,
    blocks: tuple[Sequence[Block], Sequence[Block]],
    norms: Callable[[], tuple[Tensor, Tensor]],
) -> bool:
    """Whether inner products of two Jacobians' rows left the range of float32 on the way.

    A tiny product alone does not tell: large rows have one, too, if they are nearly orthogonal. So
    it counts only if the product of the rows' norms is tiny as well.

    Args:
        products: `[M, M']`.
        blocks: The rows of both Jacobians.
        norms: The norms of both Jacobians' rows, `[M]` and `[M']`.
    """
    if not products.numel():
        return False
    peaks = [_peak(own) for own in blocks]
    if not all(peaks):
        return False  # rows, or factors in float64
    lowest = _lowest(max(peaks) ** 2)
    low, high = products.abs().aminmax()
    if float(low) >= lowest and float(high) <= _HIGHEST:
        return False
    if not float(high) <= _HIGHEST:  # nan too
        return True
    first, second = norms()
    lengths = torch.outer(first.double(), second.double())
    return bool(((lengths < lowest) & (lengths > 0)).any())


def _lowest(square: float) -> float:
    """The bound below which sums of products of such factors may lose digits."""
    return _LOWEST * max(1.0, square)


def _peak(blocks: Iterable[Block]) -> float:
    """The largest magnitude in any factor of half or float32."""
    parts = [part for block in blocks for part in block.parts if isinstance(part, Factors)]
    held = {id(tensor): tensor for part in parts for tensor in part.held()}
    narrow = [tensor for tensor in held.values() if _is_narrow(tensor) and tensor.numel()]
    if not narrow:
        return 0.0
    ends = [end.float() for tensor in narrow for end in tensor.aminmax()]  # a norm takes far longer
    return float(torch.stack(ends).abs().max())


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
