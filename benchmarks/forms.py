"""Each closed form alone: what the Gramian costs beyond the layer's own forward and backward.

A model of one layer, whose output is contracted to one number per pose with fixed random numbers.
Forward, Jacobian, Gramian and weighted gradient are timed as a ratio to forward and backward of the
summed output, which is the limit. The inputs need no gradient, so the limit holds none. The
allocator matters as in `batches.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cases import Problem
from benchmarks.per_pose import PLAIN, plain, posegrad
from benchmarks.settings import Row, Settings
from benchmarks.side_by_side import side_by_side
from posegrad import Engine

__all__ = ["LAYERS", "Layer", "run"]

Inputs = tuple[Tensor, ...]
WAYS = {(PLAIN, PLAIN): plain, ("gramian", "posegrad"): posegrad}


class Bias(nn.Module):
    """Adds one number to each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        return x + self.bias


class Centres(nn.Module):
    """Distances to points."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[m, width]` to `[m, count]`."""
        return torch.cdist(x, self.points)


class Experts(nn.Module):
    """Several linear maps of the same inputs."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[m, width]` to `[m, count, width]`."""
        return torch.matmul(x, self.weight).transpose(0, 1)


def normal(*shapes: tuple[int, ...]) -> Inputs:
    """One input of normal random numbers for each shape."""
    return tuple(torch.randn(shape) for shape in shapes)


def tokens(vocabulary: int, *shape: int) -> Inputs:
    """One input of random tokens."""
    return (torch.randint(vocabulary, shape),)


def evaluated(norm: nn.BatchNorm2d) -> nn.Module:
    """In eval mode, with statistics as after training."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


@dataclass(frozen=True)
class Layer:
    """One row of the table.

    Attributes:
        make: The layer.
        inputs: What it is given; poses along the first dimension.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


_IMAGES = partial(normal, (32, 64, 16, 16))
_TOKENS = partial(normal, (16, 64, 512))

LAYERS: dict[str, Layer] = {
    "Linear, T = 1": Layer(lambda: nn.Linear(512, 512), partial(normal, (64, 512))),
    "Linear, T = 64": Layer(lambda: nn.Linear(512, 512), _TOKENS),
    "Conv1d": Layer(lambda: nn.Conv1d(64, 64, 3, padding=1), partial(normal, (32, 64, 256))),
    "Conv2d": Layer(lambda: nn.Conv2d(64, 64, 3, padding=1), _IMAGES),
    "Conv3d": Layer(lambda: nn.Conv3d(16, 16, 3, padding=1), partial(normal, (16, 16, 12, 12, 12))),
    "Conv2d, depthwise": Layer(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), _IMAGES),
    "ConvTranspose2d": Layer(lambda: nn.ConvTranspose2d(64, 32, 2, stride=2), _IMAGES),
    "Embedding": Layer(lambda: nn.Embedding(1000, 128), partial(tokens, 1000, 32, 64)),
    "Embedding, large": Layer(lambda: nn.Embedding(30_000, 128), partial(tokens, 30_000, 32, 64)),
    "EmbeddingBag": Layer(lambda: nn.EmbeddingBag(1000, 128), partial(tokens, 1000, 32, 64)),
    "Bilinear": Layer(lambda: nn.Bilinear(64, 64, 64), partial(normal, (64, 64), (64, 64))),
    "Weights in a batch": Layer(lambda: Experts(8, 128), partial(normal, (64, 128))),
    "Distances": Layer(lambda: Centres(256, 64), partial(normal, (64, 64))),
    "RMSNorm": Layer(lambda: nn.RMSNorm(512), _TOKENS),
    "InstanceNorm2d": Layer(lambda: nn.InstanceNorm2d(64, affine=True), _IMAGES),
    "PReLU": Layer(lambda: nn.PReLU(64), _IMAGES),
    "LayerNorm": Layer(lambda: nn.LayerNorm(512), _TOKENS),
    "GroupNorm": Layer(lambda: nn.GroupNorm(8, 64), _IMAGES),
    "BatchNorm2d, eval": Layer(lambda: evaluated(nn.BatchNorm2d(64)), _IMAGES),
    "bias": Layer(lambda: Bias(512), _TOKENS),
}
"""A layer with a new form gets one row here."""


class Contracted(nn.Module):
    """A layer, and the inner product of each pose's output with fixed random numbers."""

    def __init__(self, layer: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            outputs = layer(*inputs)[0].numel()
        self.register_buffer("numbers", torch.randn(outputs, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs `[m, ...]` to `[m, 1]`."""
        y: Tensor = self.layer(*inputs).flatten(1) @ self.numbers
        return y


def run(layers: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        layers: Names out of `LAYERS`.
        settings: How.

    Returns:
        What goes into the JSON file: one row for each layer and method.
    """
    settings.prepare()
    rows: list[Row] = []
    for name in tqdm(layers):
        problem = _problem(LAYERS[name]).to(settings.device)
        found = side_by_side(problem, WAYS, settings)
        shapes = [list(x.shape) for x in problem.inputs]
        what = {"layer": name, "inputs": shapes, "forms": _forms(problem)}
        rows += [{**what, "method": method, **row} for (_, method), row in found.items()]
    return settings.result("forms", rows)


def _problem(layer: Layer) -> Problem:
    torch.manual_seed(0)
    inputs = layer.inputs()
    return Problem(Contracted(layer.make(), inputs), inputs, len(inputs[0]))


def _forms(problem: Problem) -> dict[str, list[str]]:
    """The rung by which the rows of each parameter come."""
    network = problem.network
    paths = Engine(network).jacobian(network(*problem.inputs).squeeze(1)).paths
    return {name.removeprefix("layer."): list(path) for name, path in paths.items()}
