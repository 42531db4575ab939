"""One step under a mode: the model, the engine, the scaler, and what is around them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from posegrad import Engine
from tests.device import DEVICE, seeded

__all__ = ["FEATURES", "POSES", "Found", "Mode", "Run", "Step", "mlp", "rows_of", "wide"]

FEATURES, POSES, CHUNK = 6, 6, 2

Found = dict[str, Tensor]
"""Gradients by parameter, and under `"G"` a Gramian."""


def wide(tensor: Tensor) -> Tensor:
    """What a loss is computed in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def mlp() -> nn.Module:
    """A model that no mode changes the draws of."""
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def _same(thing: Any) -> Any:
    return thing


@dataclass(frozen=True)
class Mode:
    """A way to run a model that does not change what it computes, but for rounding.

    Args:
        what: For the page.
        make: Builds the model, by the name of a variant; all have one outcome.
        dtype: Of the model and its poses.
        forward: What is around the forward alone.
        around: What is around forward and backward.
        scale: The first scale of a GradScaler, if there is one.
        rule: What is done to a rule.
        digits: The precision that the mode computes in.
        dynamic: Whether a second step has fewer poses.
    """

    what: str
    make: Mapping[str, Callable[[], nn.Module]] = field(default_factory=lambda: {"": mlp})
    dtype: torch.dtype = torch.float64
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    scale: float | None = None
    rule: Callable[[Any], Any] = _same
    digits: torch.dtype = torch.float64
    dynamic: bool = False

    @property
    def tolerance(self) -> float:
        """How far two results may be apart, relative to their norm.

        A gradient is a chain of about ten operators, each rounded by half an eps: two of them are
        some sqrt(20) / 2 = 2.2 eps apart, and at most twice that. In float64 the law of
        tests/schedule/test_equality.py holds.
        """
        eps = torch.finfo(self.digits).eps
        return 1e-10 if self.digits == torch.float64 else 4.5 * eps


class Run:
    """A model in a mode, and what a step needs.

    Args:
        mode: The mode.
        model: Of any dtype; its own from here on.
    """

    def __init__(self, mode: Mode, model: nn.Module) -> None:
        self.mode = mode
        self.model = model.to(mode.dtype)
        self.scaler = None if mode.scale is None else torch.amp.GradScaler(DEVICE.type, mode.scale)
        self.have(POSES)

    def have(self, count: int) -> None:
        """Draws that many poses, their targets, and weights of mixed signs."""
        numbers = seeded(7)
        shapes = ((count, FEATURES), (count,), (count,))
        poses, self.targets, weights = (torch.randn(s, generator=numbers).double() for s in shapes)
        self.poses = poses.to(self.mode.dtype)
        self.weights = wide(weights.to(self.mode.dtype))

    @cached_property
    def engine(self) -> Engine:
        """Made when it is first asked for, as it may refuse the model."""
        return Engine(self.model, chunk_size=CHUNK)

    def scored(self) -> Tensor:
        """The predictions `[m]`, chunk by chunk, by plain calls of the model."""
        with self.mode.forward():
            return torch.cat([self.model(chunk).reshape(-1) for chunk in self.poses.split(CHUNK)])

    def losses(self) -> Tensor:
        """The losses `[m]` of one batch."""
        with self.mode.forward():
            return self.loss_of(self.model(self.poses).reshape(-1), torch.arange(len(self.poses)))

    def loss_of(self, predictions: Tensor, numbers: Tensor) -> Tensor:
        """The losses of some poses, in float32 at least, with gradients of all signs and sizes."""
        return (wide(predictions) - self.targets[numbers].to(wide(predictions))).square()

    def loss(self, prediction: Tensor) -> Tensor:
        """The loss of a combined prediction."""
        return (wide(prediction) - 1.5).square()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, scaled if there is a scaler."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, whatever is wrapped around the model."""
        named = self.model.named_parameters()
        return {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in named}

    def taken(self, step: "Step") -> Found:
        """What a step finds, and its gradients, without the scale."""
        torch.manual_seed(1)  # dropout
        with self.mode.around():
            found = step(self)
        if self.scaler is not None:
            self.scaler.unscale_(torch.optim.SGD(self.model.parameters(), lr=0.0))
            self.scaler.update()
        gradients = {name: p.grad for name, p in self.parameters().items() if p.grad is not None}
        self.model.zero_grad()
        return found | gradients


Step = Callable[[Run], Found]
"""Adds to `.grad`; returns what else it found."""


def rows_of(losses: Tensor, run: Run) -> Tensor:
    """J `[m, n]` in float64, one plain backward for each loss; the graph is kept."""
    parameters = list(run.parameters().values())
    unit = float(run.scale(torch.ones(())))
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in unit * losses]
    return torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows]) / unit
