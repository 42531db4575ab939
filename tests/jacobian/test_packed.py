"""Graphs whose saved tensors are packed: by a checkpoint, which recomputes them, or on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from posegrad import Engine, Mean
from tests.reference import rows, trainable


class Square(torch.autograd.Function):
    """A function written in Python, as a compiled part is one."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * cotangents[0]


class Body(nn.Module):
    """A layer whose weight may be computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.gain = nn.Parameter(torch.rand(5, 1) + 0.5)
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(5, 1))
        self.maker = nn.Linear(3, 20)
        self.code = torch.randn(3, dtype=torch.float64)
        self.head = nn.Linear(5, 1)


def _normalised(m: Body, x: Tensor) -> Tensor:
    weight = m.linear.weight
    return linear(x, m.gain * weight / weight.norm(dim=1, keepdim=True)).tanh()


BODIES: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "a function of Python": lambda m, x: Square.apply(m.linear(x)),
    "a normalised weight": _normalised,
    "a low-rank update": lambda m, x: linear(x, m.linear.weight + m.up @ m.down).tanh(),
    "a generated weight": lambda m, x: linear(x, m.maker(m.code).reshape(5, 4)).tanh(),
    "one weight twice": lambda m, x: (
        linear(m.linear(x).tanh(), m.linear.weight.mT) @ m.maker.weight[:4]
    ),
}


def _checkpointed(model: Body, name: str, x: Tensor) -> Tensor:
    return checkpoint(BODIES[name], model, x, use_reentrant=False)


def _kept_on_cpu(model: Body, name: str, x: Tensor) -> Tensor:
    with save_on_cpu():
        return BODIES[name](model, x)


def _plain(model: Body, name: str, x: Tensor) -> Tensor:
    return BODIES[name](model, x)


PACKINGS = [_checkpointed, _kept_on_cpu]


# What makes a weight of a code is taken for a layer that mixes poses: slow, and exact.
@pytest.mark.filterwarnings("ignore:The predictions of different poses depend")
@pytest.mark.parametrize("packed", PACKINGS)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("check", ["first", "never"])
def test_rows_are_those_of_autograd(
    packed: Callable[[Body, str, Tensor], Tensor], name: str, check: str
) -> None:
    model = Body().double()
    engine = Engine(model, check=check)
    for _ in range(2):
        output = packed(model, name, torch.randn(5, 4).double()).sin().sum(1)
        expected = rows(output, trainable(model))
        torch.testing.assert_close(engine.jacobian(output).matrix(), expected)


@pytest.mark.parametrize("packed", PACKINGS)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("schedule", ["stream", "store", "recompute"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_schedules_give_the_gradient_of_autograd(
    packed: Callable[[Body, str, Tensor], Tensor], name: str, schedule: str, chunk_size: int
) -> None:
    model, poses = Body().double(), torch.randn(5, 4).double()

    def predict(model: Body, pose: Tensor) -> Tensor:
        return packed(model, name, pose).sin().sum(-1)

    engine = Engine(model, predict=predict, chunk_size=chunk_size)
    leaves = list(trainable(model).values())
    expected = torch.autograd.grad(
        _plain(model, name, poses).sin().sum(1).mean(), leaves, allow_unused=True
    )

    engine.combine(poses, Mean(), schedule=schedule).prediction.backward()

    for parameter, gradient in zip(leaves, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
