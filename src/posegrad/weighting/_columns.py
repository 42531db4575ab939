"""Statistics of columns, a piece of a block at a time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["by_columns", "in_order"]

_PIECE = 2**20  # numbers at once: what a statistic holds beside them stays small


def by_columns(block: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic `[M, c]` to `[c]` of every column of a block `[M, ...]`, `[...]`.

    A column with a nan gives nan: sorting would put it at an end, where it is trimmed away.
    """
    rows = block.flatten(1) if block.ndim > 1 else block.unsqueeze(1)  # [M, n]
    width = max(1, _PIECE // len(rows))
    found = [_with_nans(piece, statistic) for piece in torch.split(rows, width, dim=1)]
    return torch.cat(found).reshape(block.shape[1:])


def in_order(columns: Tensor) -> Tensor:
    """Each column sorted, `[M, c]`. On a CPU NumPy does it ten times as fast as torch 2.13."""
    plain = columns.dtype in (torch.float32, torch.float64) and not columns.requires_grad
    if plain and columns.device.type == "cpu":
        return torch.from_numpy(np.sort(columns.numpy(), axis=0))
    return columns.sort(0).values


def _with_nans(piece: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    found = statistic(piece)
    if bool(piece.sum().isfinite()):  # no nan then, and no need to look at every number
        return found
    return found.masked_fill(piece.isnan().any(0), torch.nan)
