"""A trunk in the engine, a head beside it, and losses of a few poses."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tests.device import seeded

__all__ = ["FEATURES", "M", "Warm", "drawn", "head", "losses", "taken", "trunk"]

FEATURES, M = 5, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def trunk() -> nn.Module:
    """Always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()).double()


def head() -> nn.Module:
    """Likewise."""
    torch.manual_seed(1)
    return nn.Linear(4, 1).double()


def losses(body: nn.Module, end: nn.Module, poses: Tensor) -> Tensor:
    """One loss for each pose, `[m]`."""
    return (end(body(poses)).squeeze(1) - 1.0).square()


def taken(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    """Their `.grad`, which is None afterwards."""
    tensors = [*tensors]
    found = [None if t.grad is None else t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad = None
    return found


class Warm(nn.Module):
    """A rule with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        return (torch.softmax(-self.beta * predictions, dim=0) * predictions).sum()
