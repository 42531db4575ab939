"""Puts rows of several parameters side by side, where each alone is hardly worth a product."""

from collections.abc import Collection

import torch
from torch import Tensor

from posegrad.jacobian._block import Block
from posegrad.jacobian._parts import Rows

__all__ = ["side_by_side"]

_MOST = 2**20  # numbers, since they are copied


def side_by_side(blocks: Collection[Block]) -> Tensor | None:
    """The rows `[M, n]` of all parameters, side by side.

    Args:
        blocks: The blocks that have parts.

    Returns:
        None unless each is held as rows, all of one dtype and device, and few in total.
    """
    sheets: list[Tensor] = []
    numbers = 0
    for block in blocks:
        part = block.parts[0]
        if not isinstance(part, Rows) or part.count != block.count or len(block.parts) > 1:
            return None
        sheets.append(part.rows())
        numbers += sheets[-1].numel()
        if numbers > _MOST:
            return None
    first = sheets[0] if len(sheets) > 1 else None
    if first is None or any(s.dtype != first.dtype or s.device != first.device for s in sheets):
        return None
    return torch.cat([sheet.reshape(len(sheet), -1) for sheet in sheets], dim=1)
