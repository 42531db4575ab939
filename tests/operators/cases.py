"""Models around a loss or a layer, to be read with any number of poses."""

from collections.abc import Callable
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from tests.operators.network import FEATURES, Reading, read

__all__ = [
    "POSES",
    "C",
    "Case",
    "T",
    "between",
    "function_case",
    "layer_case",
    "loss_case",
    "normal",
    "numbers",
    "per_pose",
    "reading_of",
    "reported",
    "shares",
    "signs",
    "table_case",
]  # fmt: skip

C, T = 4, 3  # classes or channels, tokens
POSES = 5

Case = Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]
"""From m to a model and a function that scores m new poses, `[m]`."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def between(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1


def numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape).double() * 2 - 1


def shares(*shape: int) -> Tensor:
    return normal(*shape).softmax(1)


def per_pose(values: Tensor) -> Tensor:
    """One number per pose."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@final
class _Scored(nn.Module):
    """A linear layer, its output in some shape, a layer behind it, and one number per pose.

    Args:
        shape: What a pose's features are made into.
        layer: A module, which is trained too, or a function.
    """

    def __init__(self, shape: tuple[int, ...], layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, prod(shape))
        self.shape, self.layer = shape, layer
        self.double()

    def forward(self, poses: Tensor) -> Tensor:
        made = self.first(poses).reshape(len(poses), *self.shape)
        return per_pose(self.layer(made))


def loss_case(shape: tuple[int, ...], function: Callable[[Tensor, int], Tensor]) -> Case:
    """A loss of predictions `[m, *shape]`; it draws its own targets."""

    def build(count: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = _Scored(shape, lambda prediction: function(prediction, count))
        return model, lambda: model(normal(count, FEATURES))

    return build


def layer_case(
    shape: tuple[int, ...],
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x),
    *,
    train: bool = False,
) -> Case:
    """A layer that takes `[m, *shape]`, and a square behind it."""

    def build(count: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = _Scored(shape, _Called(make(), call)).train(train)
        return model, lambda: model(normal(count, FEATURES))

    return build


@final
class _Called(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x).square()


@final
class _Does(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def function_case(shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Case:
    return layer_case(shape, lambda: _Does(function))


def table_case(make: Callable[[], nn.Module], call: Callable[[nn.Module, int], Tensor]) -> Case:
    """A table that is looked up, without a layer before it."""

    def build(count: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = make().double()
        return model, lambda: per_pose(call(model, count).square())

    return build


def reading_of(case: Case) -> Reading:
    """What reading its Jacobian several times came to."""
    torch.manual_seed(0)
    return read(*case(POSES))


def reported(name: str, case: Case) -> str:
    """A line: what came of it, and the backwards of the last call."""
    found = reading_of(case)
    return f"{found.kind:10s} {found.backwards:2d} {found.error:7.1e} {name}"
