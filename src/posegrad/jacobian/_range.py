"""Squares that float32 cannot hold: those of numbers above 2e19 and below 1e-19."""

from collections.abc import Iterable

import torch
from torch import Tensor

from posegrad.jacobian._block import Block

__all__ = ["left_range"]

_LIMITS = torch.finfo(torch.float32)
_LOWEST, _HIGHEST = _LIMITS.tiny / _LIMITS.eps**2, _LIMITS.max


def left_range(squares: Tensor, blocks: Iterable[Block]) -> bool:
    """Whether squared norms overflowed, or underflowed and are not zero, in half or float32.

    A clash of atoms in one pose can give it a gradient of 1e20.

    Args:
        squares: `[M]`.
        blocks: The rows that these are the norms of.
    """
    if not squares.numel():
        return False
    low, high = squares.aminmax()
    if float(low) >= _LOWEST and float(high) <= _HIGHEST:
        return False
    outside = ~((squares >= _LOWEST) & (squares <= _HIGHEST))  # nan too
    parts = [(block, part) for block in blocks for part in block.parts]
    if not any(_is_narrow(tensor) for _, part in parts for tensor in part.held()):
        return False
    live = (block.live() for block, _ in parts)  # masked poses have norms of zero
    return any(bool((outside & rows).any()) for rows in live)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
