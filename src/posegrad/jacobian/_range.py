"""Squares that float32 cannot hold: those of numbers above 2e19 and below 1e-19."""

from collections.abc import Iterable

import torch
from torch import Tensor

from posegrad.jacobian._block import Block

__all__ = ["left_range"]


def left_range(squares: Tensor, blocks: Iterable[Block]) -> bool:
    """Whether squared norms overflowed, or underflowed and are not zero, in half or float32.

    A clash of atoms in one pose can give it a gradient of 1e20.

    Args:
        squares: `[M]`.
        blocks: The rows that these are the norms of.
    """
    limits = torch.finfo(squares.dtype)
    outside = ~((squares >= limits.tiny / limits.eps**2) & squares.isfinite())
    if squares.dtype == torch.float64 or not bool(outside.any()):
        return False
    live = (block.live() for block in blocks if block.parts)  # masked poses have norms of zero
    return any(bool((outside & rows).any()) for rows in live)
