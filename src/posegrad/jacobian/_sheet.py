"""Puts rows of several parameters side by side, where each alone is hardly worth a product."""

from collections.abc import Mapping

import torch
from torch import Tensor

from posegrad.jacobian._block import Block

__all__ = ["side_by_side"]

_MOST = 2**20  # numbers, since they are copied
_MOST_OF_ONE = 2**16  # beyond, a product takes longer than the call


def side_by_side(blocks: Mapping[str, Block]) -> tuple[list[Tensor], list[str]]:
    """The rows `[M, n]` of small parameters, side by side.

    Args:
        blocks: The blocks that have parts.

    Returns:
        The sheet, of those that are held as rows and have the first one's dtype and device; none if
        there are fewer than two. And the names of all parameters that are not in it.
    """
    found: dict[str, Tensor] = {}
    numbers = 0
    for name, block in blocks.items():
        if not block.is_plain():
            continue
        rows = block.matrix()
        first = next(iter(found.values()), rows)
        alike = (rows.dtype, rows.device) == (first.dtype, first.device)
        if alike and rows.numel() <= _MOST_OF_ONE and numbers + rows.numel() <= _MOST:
            found[name] = rows
            numbers += rows.numel()
    if len(found) < 2:
        return [], [*blocks]
    sheet = torch.cat([*found.values()], dim=1)
    return [sheet], [name for name in blocks if name not in found]
