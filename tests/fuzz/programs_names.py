"""What the text of a program may name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["names"]

MAGNITUDES: dict[str, Callable[[Tensor], None]] = {
    "plain": lambda s: None,
    "one huge": lambda s: s[-1:].mul_(1e30),
    "one large": lambda s: s[:1].mul_(1e16),
    "one tiny": lambda s: s[:1].mul_(1e-30),
    "all tiny": lambda s: s.mul_(1e-30),
    "all huge": lambda s: s.mul_(1e30),
    "one masked": lambda s: s[len(s) // 2 :][:1].zero_(),
    "ends masked": lambda s: s[:: max(1, len(s) - 1)].zero_(),
    "wide": lambda s: s.mul_(torch.logspace(-12, 12, len(s), dtype=s.dtype)),
}


class Times(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


class Product(Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        along = g @ w.mT if ctx.needs_input_grad[0] else None
        return along, x.flatten(0, -2).mT @ g.flatten(0, -2) if ctx.needs_input_grad[1] else None


class TwoOutputs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x + 2 * w

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w + h, (g * x + 2 * h).sum_to_size(w.shape)


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Turned(Function):
    """The identity, with its cotangent's sign turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Saving(Function):
    """The exponential of the tangent, from the saved output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.sin().exp()
        ctx.save_for_backward(x, result)
        ctx.factor = 1.0
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, result = ctx.saved_tensors
        return ctx.factor * g * result * x.cos()


def names(seed: int, magnitude: str, stated: list[Tensor]) -> dict[str, Any]:
    """The names, with constants that depend on the seed and their key alone."""

    def drawn(key: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed * 1_000_003 + key)

    def noise(key: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn(key), dtype=torch.float64)

    def ints(key: int, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=drawn(key))

    def mask(key: int, *shape: int) -> Tensor:
        return torch.rand(shape, generator=drawn(key)) < 0.5

    def perm(key: int, count: int) -> Tensor:
        return torch.randperm(count, generator=drawn(key))

    def scale(key: int, count: int) -> Tensor:
        found = 1 + noise(key, count).abs()
        MAGNITUDES[magnitude](found)
        return found

    own = {one.__name__: one for one in (Times, Product, TwoOutputs, Doubled, Turned, Saving)}
    constants = {"noise": noise, "ints": ints, "mask": mask, "perm": perm, "scale": scale}
    modules = {"torch": torch, "F": functional, "nn": torch.nn, "checkpoint": checkpoint}
    return own | constants | modules | {"state": stated.append}
