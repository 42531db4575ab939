"""What the suite `bags` differentiates: a bag of patches, and pairs for two encoders."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posegrad import AttentionPooling, TopK

__all__ = ["CASES", "Case", "Task"]

PATCHES, PAIRS = 1000, 512
WIDTH = 64  # numbers of an embedding


@dataclass(frozen=True)
class Task:
    """What a way has to do.

    Attributes:
        networks: One for a bag, two for pairs; those and `rule` are trained.
        inputs: Those of each network.
        rule: From the embeddings of all networks to the loss.
        chunk_size: How many are scored together.
        best: How many poses count, if it is a few of the best scores.
    """

    networks: nn.ModuleList
    inputs: tuple[Tensor, ...]
    rule: nn.Module
    chunk_size: int
    best: int | None = None

    def to(self, what: Any) -> "Task":
        """A copy on another device or in another precision."""
        networks, rule = (copy.deepcopy(m).to(what) for m in (self.networks, self.rule))
        return replace(
            self, networks=networks, rule=rule, inputs=tuple(x.to(what) for x in self.inputs)
        )

    def trained(self) -> nn.ModuleList:
        """All that gets a gradient."""
        return nn.ModuleList([*self.networks, self.rule])


@dataclass(frozen=True)
class Case:
    """A task and the ways to do it.

    Attributes:
        text: What it is.
        make: Makes it.
        ways: By name; the first is the unit of times, the one whose name says so is done by hand.
    """

    text: str
    make: Callable[[], Task]
    ways: tuple[str, ...]


class Logit(nn.Module):
    """Gated attention over the patches of a positive bag, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPooling(WIDTH, gated=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """The loss `[]`."""
        return nn.functional.softplus(-self.head(self.pool(patches))).squeeze()


class BestScores(nn.Module):
    """The mean of the few highest scores of a positive bag, and its loss."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.best = TopK(k, largest=True)

    def forward(self, scores: Tensor) -> Tensor:
        """The loss `[]`."""
        return nn.functional.softplus(-self.best(scores))


class Contrast(nn.Module):
    """InfoNCE, with a temperature that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss `[]` of pairs `[m, d]` and `[m, d]`."""
        x, y = nn.functional.normalize(x), nn.functional.normalize(y)
        similarities = x @ y.T / self.temperature  # [m, m]
        own = torch.arange(len(x), device=x.device)
        both = nn.functional.cross_entropy(similarities, own)
        return both + nn.functional.cross_entropy(similarities.T, own)


def _patches() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, WIDTH))


def _bag(rule: nn.Module, *last: nn.Module, best: int | None = None) -> Task:
    network = nn.Sequential(_patches(), *last)
    patches = torch.randn(PATCHES, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return Task(nn.ModuleList([network]), (patches,), rule, 100, best)


def _attention() -> Task:
    torch.manual_seed(0)
    return _bag(Logit())


def _best() -> Task:
    torch.manual_seed(0)
    last = nn.ReLU(), nn.Linear(WIDTH, 1), nn.Flatten(0)
    return _bag(BestScores(8), *last, best=8)


def _pairs() -> Task:
    torch.manual_seed(0)
    images = nn.Sequential(_patches(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True)
    texts = nn.Sequential(
        nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * WIDTH, WIDTH)
    )
    inputs = (
        torch.randn(PAIRS, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        torch.randn(PAIRS, 16, WIDTH, generator=torch.Generator().manual_seed(2)),
    )
    return Task(nn.ModuleList([images, texts]), inputs, Contrast(), 128)


TWICE = ("plain", "checkpoint", "two passes by hand", "posegrad")

CASES: dict[str, Case] = {
    "gated attention": Case("1000 patches 3x64x64, gated attention", _attention, TWICE),
    "TopK(8)": Case(
        "1000 patches 3x64x64, the mean of the 8 best scores",
        _best,
        ("plain", "checkpoint", "the best again by hand", "posegrad"),
    ),
    "contrast": Case("512 pairs, an image and a text encoder with dropout, InfoNCE", _pairs, TWICE),
}
