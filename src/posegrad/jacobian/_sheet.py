"""Puts rows of several parameters side by side, where each alone is hardly worth a product."""

from collections.abc import Mapping

import torch
from torch import Tensor

from posegrad.jacobian._block import Block
from posegrad.jacobian._parts import Rows

__all__ = ["side_by_side"]

_MOST = 2**20  # numbers, since they are copied
_MOST_OF_ONE = 2**16  # beyond, a product takes longer than the call


def side_by_side(blocks: Mapping[str, Block]) -> tuple[Tensor | None, list[str]]:
    """The rows `[M, n]` of small parameters, side by side.

    Args:
        blocks: The blocks that have parts.

    Returns:
        The sheet, of those that are held as rows and have the first one's dtype and device; None if
        there are fewer than two. And the names of all parameters that are not in it.
    """
    found: dict[str, Tensor] = {}
    numbers = 0
    for name, block in blocks.items():
        part = block.parts[0]
        if not isinstance(part, Rows) or part.count != block.count or len(block.parts) > 1:
            continue
        rows = part.rows()
        first = next(iter(found.values()), rows)
        alike = (rows.dtype, rows.device) == (first.dtype, first.device)
        if alike and rows.numel() <= _MOST_OF_ONE and numbers + rows.numel() <= _MOST:
            found[name] = rows
            numbers += rows.numel()
    if len(found) < 2:
        return None, [*blocks]
    sheet = torch.cat(
        [rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1) for rows in found.values()], dim=1
    )
    return sheet, [name for name in blocks if name not in found]
