"""The networks of the suites on one batch, and what they are given."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS, distinct_poses

__all__ = ["CASES", "Case", "Problem", "described"]


@dataclass(frozen=True)
class Problem:
    """A network and `m` poses; `network(*inputs)` gives one number for each, `[m, 1]`.

    Attributes:
        network: Always the same one.
        inputs: Of all poses together.
        m: How many poses they are.
        max_norm: To clip their gradients to, near the median of the norms.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    m: int
    max_norm: float = 1.0

    @cached_property
    def weights(self) -> Tensor:
        """Of the weighted gradient, `[m]`: fixed, random, of both signs."""
        weights = torch.randn(self.m, generator=torch.Generator().manual_seed(1))
        return weights.to(self.inputs[0].device)

    def double(self) -> Self:
        """A copy of the problem in float64."""
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return replace(self, network=copy.deepcopy(self.network).double(), inputs=inputs)

    def to(self, device: str) -> Self:
        """The same problem on a device."""
        inputs = tuple(tensor.to(device) for tensor in self.inputs)
        return replace(self, network=self.network.to(device), inputs=inputs)


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        text: What the network is, in words.
        m: Number of poses.
        make: The problem with a number of poses.
        kind: What decides which peers can run it.
    """

    text: str
    m: int
    make: Callable[[int], Problem]
    kind: str


class Encoder(nn.Module):
    """A transformer encoder, the mean of its tokens, and a number read from it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[m, T, width]` to `[m, 1]`."""
        y: Tensor = self.head(self.encoder(x).mean(dim=1))
        return y


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1)
    )


def _convolutions() -> nn.Module:
    def block(c: int, d: int) -> list[nn.Module]:
        return [nn.Conv2d(c, d, 3, padding=1), nn.GroupNorm(8, d), nn.ReLU()]

    first = [*block(3, 32), *block(32, 32), nn.MaxPool2d(2)]
    second = [*block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(64, 1))


def _dense(
    network: Callable[[], nn.Module], shape: tuple[int, ...], max_norm: float, m: int
) -> Problem:
    torch.manual_seed(0)
    return Problem(network(), (torch.randn(m, *shape),), m, max_norm)


def _docked(m: int) -> Problem:
    """Distinct docked poses, atom after atom in one batch; they differ in size."""
    poses = distinct_poses(m)
    sizes = torch.tensor([len(pose.z) for pose in poses])
    batch = torch.arange(m).repeat_interleave(sizes)  # [a], the pose of each atom
    z, xyz = torch.cat([p.z for p in poses]), torch.cat([p.xyz for p in poses])
    return Problem(MODELS["SchNet"].make(), (z, xyz, batch), m)


_MLP = partial(_dense, _mlp, (512,), 8.5)
_CONVOLUTIONS = partial(_dense, _convolutions, (3, 32, 32), 12.3)
_ENCODER = partial(_dense, partial(Encoder, 128, 4), (64, 128), 9.0)
_LARGE = partial(_dense, partial(Encoder, 512, 10), (64, 512), 39.7)

_MLP_TEXT = "MLP 512-1024-1024-1"
_ENCODER_TEXT = "transformer encoder, d = 128, 4 layers, T = 64"

CASES: dict[str, Case] = {
    "mlp-16": Case(_MLP_TEXT, 16, _MLP, "mlp"),
    "mlp-64": Case(_MLP_TEXT, 64, _MLP, "mlp"),
    "mlp-256": Case(_MLP_TEXT, 256, _MLP, "mlp"),
    "conv-32": Case(
        "four convolutions with group norm, 3x32x32", 32, _CONVOLUTIONS, "convolutions"
    ),
    "encoder-4": Case(_ENCODER_TEXT, 4, _ENCODER, "encoder"),
    "encoder-16": Case(_ENCODER_TEXT, 16, _ENCODER, "encoder"),
    "encoder-64": Case(_ENCODER_TEXT, 64, _ENCODER, "encoder"),
    "large-8": Case(
        "transformer encoder, 31.5 M parameters, d = 512, 10 layers, T = 64", 8, _LARGE, "large"
    ),
    "schnet-16": Case("PyG SchNet, docked poses in one ragged batch", 16, _docked, "ragged"),
}


def described(names: Sequence[str]) -> list[dict[str, str | int]]:
    """What tables say of cases."""
    return [{"case": name, "text": CASES[name].text, "poses": CASES[name].m} for name in names]
