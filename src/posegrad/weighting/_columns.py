"""Statistics of columns, a piece of a block at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["by_columns"]

_PIECE = 2**21  # numbers that are sorted at once, which takes three times their size


def by_columns(block: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic `[M, c]` to `[c]` of every column of a block `[M, ...]`, `[...]`.

    A column with a nan gives nan: sorting would put it at an end, where it is trimmed away.
    """
    rows = block.flatten(1) if block.ndim > 1 else block.unsqueeze(1)  # [M, n]
    width = max(1, _PIECE // len(rows))
    found = [
        statistic(piece).masked_fill(piece.isnan().any(0), torch.nan)
        for piece in torch.split(rows, width, dim=1)
    ]
    return torch.cat(found).reshape(block.shape[1:])
