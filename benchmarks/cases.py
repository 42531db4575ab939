"""The networks of the suite `gramian`, and what they are given."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.methods import distinct_poses, model

__all__ = ["CASES", "Case", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A network and `m` poses; `network(*inputs)` gives one number for each, `[m, 1]`.

    Attributes:
        network: Always the same one.
        inputs: Of all poses together.
        m: How many poses they are.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    m: int

    @property
    def weights(self) -> Tensor:
        """Of the weighted gradient, `[m]`: fixed, random, of both signs."""
        return torch.randn(self.m, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        text: What the network is, in words.
        m: Number of poses.
        make: The problem with a number of poses.
        kind: `"dense"`, one entry of a tensor each pose, or `"ragged"`, poses of different size.
    """

    text: str
    m: int
    make: Callable[[int], Problem]
    kind: str = "dense"


class Encoder(nn.Module):
    """A transformer encoder, the mean of its tokens, and a number read from it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 512, dropout=0.0, batch_first=True)
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


def _dense(network: Callable[[], nn.Module], shape: tuple[int, ...], m: int) -> Problem:
    torch.manual_seed(0)
    return Problem(network(), (torch.randn(m, *shape),), m)


def _docked(m: int) -> Problem:
    """Distinct docked poses, atom after atom in one batch; they differ in size."""
    poses = distinct_poses(m)
    sizes = torch.tensor([len(pose.z) for pose in poses])
    batch = torch.arange(m).repeat_interleave(sizes)  # [a], the pose of each atom
    z, xyz = torch.cat([p.z for p in poses]), torch.cat([p.xyz for p in poses])
    return Problem(model(), (z, xyz, batch), m)


_MLP = partial(_dense, _mlp, (512,))
_CONVOLUTIONS = partial(_dense, _convolutions, (3, 32, 32))
_ENCODER = partial(_dense, partial(Encoder, 128, 4), (64, 128))

CASES: dict[str, Case] = {
    "mlp-64": Case("MLP 512-1024-1024-1", 64, _MLP),
    "mlp-256": Case("MLP 512-1024-1024-1", 256, _MLP),
    "conv-32": Case("four convolutions with group norm, 3x32x32", 32, _CONVOLUTIONS),
    "encoder-16": Case("transformer encoder, d = 128, 4 layers, T = 64", 16, _ENCODER),
    "schnet-16": Case("PyG SchNet, docked poses in one ragged batch", 16, _docked, "ragged"),
}
