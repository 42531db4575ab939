"""Models that a reader of graphs could get wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.drawing import double

__all__ = ["TRAPS", "WARNED"]

Model = Callable[[], nn.Module]
Output = Callable[[nn.Module], Tensor]


class WrittenToken(nn.Module):
    """A parameter written into a row of an activation, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.new_zeros(len(x), 3, 4)
        tokens[:, 1:] = x
        tokens[:, 0] = self.token
        return self.head(torch.tanh(tokens).cumsum(1)).sum((1, 2))


class WrittenInto(nn.Module):
    """Parameters that change an input in place, some by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, torch.tensor([0, 2])] += self.shift[:2]
        x.mul_(self.shift)
        return self.head(x).squeeze(1)


class RelativePositions(nn.Module):
    """A bias of attention, looked up by the distance of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(9))
        self.query = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        distance = torch.arange(5)[:, None] - torch.arange(5) + 4
        weights = (query @ query.mT + self.bias[distance]).softmax(-1)
        return (weights @ query).sum((1, 2))


class OffsetPerPose(nn.Module):
    """A parameter with one entry for each pose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x).squeeze(1) + self.offset).square()


class Temperature(nn.Module):
    """A number that divides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) / nn.functional.softplus(self.temperature)


class Empty(nn.Module):
    """A parameter without a number, which enters all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.linear = nn.Parameter(torch.zeros(0, 4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) + (x @ self.none.mT).sum(1) + self.none.sum()


class Spectrum(nn.Module):
    """Complex weights whose cotangents come conjugated, but only in name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.parts = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(self.linear(x)) * torch.view_as_complex(self.parts)
        return filtered.conj().imag.square().sum(1) + filtered.conj().angle().sum(1)


class Scaled(torch.autograd.Function):
    """Arguments that are no tensors before, between and after those that are; a second output."""

    @staticmethod
    def forward(
        ctx: Any, factor: float, x: Tensor, name: str, first: Tensor, second: Tensor, flag: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second)
        ctx.factor = factor
        return factor * x * first + x * second, x * first

    @staticmethod
    def backward(ctx: Any, one: Tensor, two: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        along = (ctx.factor * first + second) * one + first * two
        return None, along, None, (x * (ctx.factor * one + two)).sum(0), (x * one).sum(0), None


class Scaling(nn.Module):
    """Two parameters in a function of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(double(4)), nn.Parameter(double(4))

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(3.0, x, "name", self.first, self.second, True)[0].sin().sum(1)


class Residuals(nn.Module):
    """Blocks that a signal passes through or around, in front of a place where poses mix."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        scores = self.head(x).squeeze(1)
        return (scores - scores.mean()).square()


def _powers(model: nn.Module) -> Tensor:
    weight = model.weight @ model.weight
    return (double(6, 4) @ weight @ model.weight.T).sum(1) + model.bias[0]


def _no_pose_at_all(model: nn.Module) -> Tensor:
    return torch.stack([model(double(4)).squeeze(), model.weight.square().sum()])


def _of_no_width(model: nn.Module) -> Tensor:
    x = double(6, 2, 4)
    parts = [model(x), x[..., :0] @ model.weight[:0, :].mT[:0], x @ model.weight[:0].mT]
    return torch.cat([parts[0], parts[1].expand(6, 2, 0), parts[2]], -1).sin().sum((1, 2))


def _one_pixel(model: nn.Module) -> Tensor:
    images = double(5, 1, 1, 2).movedim(-1, 1)  # strides of channels last
    return nn.functional.conv2d(images, model.weight, padding=1).sin().sum((1, 2, 3))


def _nested(model: nn.Module) -> Tensor:
    parts = [double(count, 4) for count in (2, 3)]
    scores = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    return torch.stack([score.sum() for score in scores.unbind()])


def _padded(*pad: int) -> Output:
    return lambda model: nn.functional.pad(model(double(4, 4)).tanh(), pad).sum(1)


def _linear(outputs: int) -> Model:
    return lambda: nn.Linear(4, outputs)


# name: how to make the model, and what is read of it
TRAPS: dict[str, tuple[Model, Output]] = {
    "a token written in place": (WrittenToken, lambda m: m(double(5, 2, 4))),
    "inputs written in place": (WrittenInto, lambda m: m(double(5, 4))),
    "relative positions": (RelativePositions, lambda m: m(double(3, 5, 4))),
    "an offset for each pose": (OffsetPerPose, lambda m: m(double(6, 4))),
    "a temperature": (Temperature, lambda m: m(double(6, 4))),
    "powers of a weight": (_linear(4), _powers),
    "a parameter of no size": (Empty, lambda m: m(double(6, 4))),
    "lazy conjugates": (Spectrum, lambda m: m(double(6, 4))),
    "a part of no width": (_linear(2), _of_no_width),
    "images of one pixel": (lambda: nn.Conv2d(2, 1, 3, bias=False), _one_pixel),
    "a penalty in every loss": (
        _linear(1),
        lambda m: m(double(6, 4)).squeeze(1) + m.weight.square().sum(),
    ),
    "a loss of no pose": (_linear(1), _no_pose_at_all),
    "an outer product": (_linear(4), lambda m: torch.outer(m.bias, double(6)).sum(0)),
    "t of one dimension": (_linear(4), lambda m: (double(6, 4) * m.bias.t()).sin().sum(1)),
    "a weight on the left of one pose": (
        _linear(4),
        lambda m: (m.weight @ double(4)).sin().sum().reshape(1),
    ),
    "padding that shifts poses on": (_linear(2), _padded(0, 0, 1, -1)),
    "padding that shifts poses back": (_linear(2), _padded(0, 0, -1, 1)),
    "padding of features": (_linear(2), _padded(1, 2)),
    "padding by nothing": (_linear(2), _padded(0, 0, 0, 0)),
    "a function of Python": (Scaling, lambda m: m(double(3, 4))),
    "a function of Python, of data that require grad": (
        Scaling,
        lambda m: m(double(3, 4).requires_grad_()),
    ),
    "sorted predictions": (_linear(1), lambda m: m(double(6, 4)).squeeze(1).sort().values),
    "predictions of 1e-40": (_linear(1), lambda m: m(double(6, 4)).squeeze(1) * 1e-40),
    "predictions of 1e40": (_linear(1), lambda m: m(double(6, 4)).squeeze(1) * 1e40),
}

# The same, and what a warning says of the slower way that they take. 2^24 paths lead around so many
# blocks; walking them one by one would never end.
WARNED: dict[str, tuple[Model, Output, str]] = {
    "nested tensors": (_linear(1), _nested, "one backward through the graph"),
    "many paths but few sites": (
        lambda: Residuals(24),
        lambda m: m(double(3, 4)),
        "depend on each other",
    ),
}
