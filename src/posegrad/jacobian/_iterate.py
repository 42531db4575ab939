"""Single rows of a Jacobian, or all of them in turn."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["each", "numbers_along", "one_at", "picks_one", "rows_at"]

Pick = Callable[[Any], dict[str, Tensor]]
"""From the index of one number of the output to its gradient."""


def each(shape: torch.Size, pick: Pick) -> Iterator[dict[str, Tensor]]:
    """The rows of each entry of the output's first dimension, `[*shape[1:], *parameter.shape]`.

    Args:
        shape: The output's shape.
        pick: Gives single rows.

    Raises:
        TypeError: at once, and not at the first row, if the output has no dimension.
    """
    if not shape:
        raise TypeError(
            "The output is a number without dimensions, so there is nothing to iterate over.\n"
            "Its gradient is J[()]."
        )
    return (rows_at(i, shape[1:], pick) for i in range(shape[0]))


def rows_at(index: int, inner: torch.Size, pick: Pick) -> dict[str, Tensor]:
    """The rows of one entry of the first dimension, `[*inner, *parameter.shape]`."""
    if not inner:
        return pick(index)
    rows = [pick((index, *place)) for place in product(*map(range, inner))]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: s.reshape(*inner, *s.shape[1:]) for name, s in stacked.items()}


def picks_one(index: Any) -> bool:
    """Whether an index picks one row or is a tuple of numbers; otherwise it picks several rows."""
    if isinstance(index, Tensor):
        return index.ndim == 0 and index.dtype != torch.bool
    return isinstance(index, tuple) or (isinstance(index, Integral) and not isinstance(index, bool))


def numbers_along(index: Any, shape: torch.Size) -> Tensor:
    """The entries of dimension 0 that an index picks, as numbers on the CPU.

    Raises:
        IndexError: if it is no slice, mask or list of numbers, or out of range.
    """
    if not shape:
        raise IndexError("The output is a number without dimensions: its gradient is J[()].")
    count = shape[0]
    if isinstance(index, slice):
        return torch.tensor(range(count)[index], dtype=torch.long)
    is_listed = isinstance(index, Sequence | np.ndarray) and not isinstance(index, str)
    found = torch.as_tensor(index).cpu() if is_listed or isinstance(index, Tensor) else None
    if found is not None and found.dtype == torch.bool and found.shape == (count,):
        return found.nonzero().squeeze(1)
    is_whole = found is not None and not (found.is_floating_point() and found.numel())
    if found is None or not is_whole or found.dtype == torch.bool or found.ndim != 1:
        shown = f"{list(index.shape)}, {index.dtype}" if isinstance(index, Tensor) else repr(index)
        raise IndexError(
            f"J is indexed by {shown}, but it has {count} entries along the dimension 0 of its "
            f"output.\nPass a number, a tuple with a number for each dimension, a slice, a mask "
            f"[{count}], or a list of numbers."
        )
    found = found.long()
    wrong = found[(found < -count) | (found >= count)].tolist()
    if wrong:
        raise IndexError(f"J has {count} entries along dimension 0, but was asked for {wrong}.")
    return found % max(count, 1)


def one_at(index: Any, predictions: Tensor) -> Tensor:
    """Weights with a single 1, at the index, and zeros elsewhere.

    Raises:
        IndexError: if the index is out of range or picks several.
    """
    weights = torch.zeros_like(predictions)
    if isinstance(index, int) and not -len(predictions) <= index < len(predictions):
        raise IndexError(
            f"{index} is out of range: the output has {len(predictions)} entries along dimension 0."
        )
    if weights[index].numel() != 1:
        raise IndexError(
            f"{index!r} picks {weights[index].numel()} numbers of an output of shape "
            f"{list(predictions.shape)}, but a row belongs to one. Give an index for each "
            f"dimension, or use block()."
        )
    weights[index] = 1
    return weights
