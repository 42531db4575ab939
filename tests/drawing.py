"""How many examples a property test draws, in parts of what the profile says; numbers to draw."""

import torch
from hypothesis import settings
from torch import Tensor

__all__ = ["double", "times"]


def times(factor: float) -> settings:
    """Fewer where each is dear or there is a test for every row of a table, more where neither."""
    return settings(max_examples=max(1, round(factor * settings.default.max_examples)))


def double(*shape: int) -> Tensor:
    """Normal numbers of so many digits that a comparison of gradients tells a mistake apart."""
    return torch.randn(shape, dtype=torch.float64)
