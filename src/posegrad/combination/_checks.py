"""Checks of a rule's arguments, done once when the rule is made."""

import math

import torch
from torch import Tensor

__all__ = ["number", "positive", "whole"]


def number(value: float | Tensor) -> float:
    """The plain number in `value`; for a tensor this waits for its device."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def positive(name: str, value: float | Tensor) -> float | Tensor:
    """Returns `value`, a positive finite number or a tensor of one such number.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, but it is one number. "
            f"Pass a float or a tensor with one element."
        )
    found = number(value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{name} is {found}, but it must be positive and finite.")
    return value if isinstance(value, Tensor) else found


def whole(name: str, value: int) -> int:
    """Returns `value`, a whole number of at least one.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(value, bool | torch.Tensor) or not float(value).is_integer() or value < 1:
        raise ValueError(f"{name} is {value}, but it must be a whole number of at least 1.")
    return int(value)
