"""What a row of the table of architectures is, and how most rows draw their data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.device import seeded

__all__ = ["Architecture", "M", "Output", "batch", "draw", "score", "steps", "tokens"]

M = 6
"""Poses in a batch."""

Output = Callable[[nn.Module, int], Tensor]
"""From a model and a seed to an output with its graph, of fresh data."""


@dataclass(frozen=True)
class Architecture:
    """A model and a way to call it.

    Args:
        what: One line for the docs.
        make: Builds the model.
        output: Calls it.
        outcome: `"exact-fast"` if every part is a closed form, `"exact-slow"` if one is not, or the
            exception it must raise.
        dense: Whether it is an ordinary batch-first model, which needs no check to be exact.
        warns: Whether the first gather warns that it is slow.
        linear: Whether backward is linear, so that wᵀJ is what a plain backward of w gives.
        released: Whether the graph can be freed without a backward through it.
        dtype: Of the model and its data.
        tolerance: Largest error, relative to the largest entry.
        match: What the exception says.
    """

    what: str
    make: Callable[[], nn.Module]
    output: Output
    outcome: str | type[Exception] = "exact-fast"
    dense: bool = False
    warns: bool = False
    linear: bool = True
    released: bool = True
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    match: str = ""

    def build(self) -> nn.Module:
        """The model, in its dtype."""
        model = self.make()
        return model if self.dtype.is_complex else model.to(self.dtype)

    @property
    def exact(self) -> bool:
        """Whether it gives numbers, not an error."""
        return isinstance(self.outcome, str)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed and the shape only."""
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def tokens(seed: int, *shape: int, below: int = 7) -> Tensor:
    """Whole numbers from 0."""
    return torch.randint(below, shape, generator=seeded(seed))


def score(y: Tensor, dim: int = 0) -> Tensor:
    """One number for each pose `[m]`, of everything the model says about it."""
    y = y.movedim(dim, 0)
    return y.flatten(1).sin().sum(1) if y.ndim > 1 else y


def batch(
    *shape: int,
    then: Callable[[Tensor], Tensor] = score,
    inputs: Callable[..., Tensor] = draw,
    m: int = M,
) -> Output:
    """Calls the model with one tensor `[m, *shape]`."""
    return lambda model, seed: then(model(inputs(seed, m, *shape)))


def steps(model: nn.Module, output: Output, seeds: range) -> None:
    """Plain training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed in seeds:
        optimizer.zero_grad()
        output(model, seed).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
