"""Single rows of a Jacobian, and all of them one after another."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

__all__ = ["each", "one_at"]

Pick = Callable[[Any], dict[str, Tensor]]
"""From an index of one number of the output to its gradient."""


def each(shape: torch.Size, pick: Pick) -> Iterator[dict[str, Tensor]]:
    """For each index of the output's first dimension its rows, `[*shape[1:], *parameter.shape]`.

    Args:
        shape: The output's.
        pick: Gives single rows.

    Raises:
        TypeError: if the output has no dimension; at once, and not at the first row.
    """
    if not shape:
        raise TypeError(
            "The output is a number without dimensions, so there is nothing to iterate over.\n"
            "Its gradient is J[()]."
        )
    return (_at(i, shape[1:], pick) for i in range(shape[0]))


def _at(index: int, inner: torch.Size, pick: Pick) -> dict[str, Tensor]:
    if not inner:
        return pick(index)
    rows = [pick((index, *place)) for place in product(*map(range, inner))]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: s.reshape(*inner, *s.shape[1:]) for name, s in stacked.items()}


def one_at(index: Any, predictions: Tensor) -> Tensor:
    """The weights of which one is 1 and the others 0.

    Raises:
        IndexError: if the index is out of range or picks several.
    """
    weights = torch.zeros_like(predictions)
    if weights[index].numel() != 1:
        raise IndexError(
            f"{index!r} picks {weights[index].numel()} numbers of an output of shape "
            f"{list(predictions.shape)}, but a row belongs to one. Give an index for each "
            f"dimension, or use block()."
        )
    weights[index] = 1
    return weights
