"""Plain autograd for whole training loops, in one process, whatever the number of ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from posegrad import Boltzmann, Combination, Mean, Min
from tests.device import seeded

FEATURES = 6
Compound = tuple[Tensor | list[Tensor], Tensor]
"""Stacked poses `[m, 6]`, and the target of the compound."""


class Learned(Combination):
    """A thermal average whose temperature is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, predictions: Tensor) -> Tensor:
        weights = torch.softmax(-self.beta * predictions, dim=0)  # [m]
        return (weights * predictions).sum(dim=0)


# name: schedule and rule
RULES: dict[str, tuple[str, Callable[[], Combination]]] = {
    "stream": ("stream", Mean),
    "recompute": ("recompute", lambda: Min(scale=1000.0)),
    "store": ("store", lambda: Boltzmann(kT=0.6)),
    "retain": ("retain", lambda: Min(scale=2.0)),
    "auto, soft": ("auto", lambda: Boltzmann(kT=0.6)),
    "auto, sharp": ("auto", lambda: Min(scale=1000.0)),
    "auto, trained": ("auto", Learned),
}


def network() -> nn.Module:
    """Small, smooth, in double precision, and always the same."""
    generator = seeded(7)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def compounds(count: int, seed: int = 0, most: int = 6) -> list[Compound]:
    """Compounds of two poses and more, no two alike."""
    generator = seeded(seed)
    sizes = torch.randint(2, most + 1, (count,), generator=generator).tolist()
    return [
        (
            torch.randn(m, FEATURES, generator=generator, dtype=torch.float64),
            torch.randn((), generator=generator, dtype=torch.float64),
        )
        for m in sizes
    ]


def plain_loss(model: nn.Module, rule: Combination, compound: Compound) -> Tensor:
    """The squared error of one compound, through one graph of all its poses."""
    poses, target = compound
    return (rule(torch.stack([model(pose).squeeze() for pose in poses])) - target).square()


def plain_step(model: nn.Module, rule: Combination, batch: Sequence[Compound]) -> None:
    """Adds to `.grad` the gradient of the mean over compounds: of ranks, or accumulated."""
    for compound in batch:
        (plain_loss(model, rule, compound) / len(batch)).backward()


def assert_same(found: nn.Module, expected: nn.Module, *, gradients: bool = False) -> None:
    """Parameters, or gradients, equal to 1e-10."""
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, p), q in pairs:
        one, other = (p.grad, q.grad) if gradients else (p, q)
        torch.testing.assert_close(
            one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
