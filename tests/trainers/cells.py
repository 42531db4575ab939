"""The cells of the table in docs/trainers.md: what a step computes, and how it is trained.

Each trainer runs the same steps as a loop by hand, and ends with the same parameters.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchjd.aggregation import UPGradWeighting

from posegrad import Boltzmann, Engine, Listening, MultiPose
from tests.device import DEVICE, seeded
from tests.trainers.oracle import FEATURES, network, plain_loss

__all__ = ["CELLS", "SETTINGS", "WAYS", "Batch", "Cell", "optimizer_of"]

STEPS = 3
Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
"""From a module, as a trainer has wrapped it, and a batch to the loss that it differentiates."""


@dataclass(frozen=True)
class Way:
    """What a step computes.

    Args:
        module: What the trainer holds.
        loss: Makes the loss, from that module before it is wrapped.
        by_hand: Adds the gradient of one batch to `.grad`, times a factor, without a trainer.
    """

    module: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Loss]
    by_hand: Callable[[nn.Module, Batch, float, AbstractContextManager[Any]], None]


@dataclass(frozen=True)
class Setting:
    """How it is trained.

    Args:
        accumulated: Batches in one optimizer step of a process.
        half: Whether in bfloat16.
    """

    accumulated: int = 1
    half: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and poses."""
        return torch.float32 if self.half else torch.float64

    def autocast(self) -> AbstractContextManager[Any]:
        """What is around a forward by hand."""
        return torch.autocast(DEVICE.type, torch.bfloat16) if self.half else nullcontext()


def _squares(predictions: Tensor, target: Tensor) -> Tensor:
    return (
        (predictions.float() if predictions.dtype == torch.bfloat16 else predictions)
        .sub(target)
        .square()
    )


def _combined(_: nn.Module) -> Loss:
    def loss(module: nn.Module, batch: Batch) -> Tensor:
        poses, target = batch
        return _squares(module(poses)[0], target)

    return loss


def _combined_by_hand(
    module: nn.Module, batch: Batch, factor: float, autocast: AbstractContextManager[Any]
) -> None:
    assert isinstance(module, MultiPose)
    with autocast:
        loss = plain_loss(module.model, module.rule, batch)
    (factor * loss).backward()


def _ruled(module: nn.Module) -> Loss:
    engine, rule = Engine(module), UPGradWeighting()

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        poses, target = batch
        return engine.loss(_squares(wrapped(poses).squeeze(1), target), rule)

    return loss


def _ruled_by_hand(
    module: nn.Module, batch: Batch, factor: float, autocast: AbstractContextManager[Any]
) -> None:
    poses, target = batch
    with autocast:
        losses = _squares(module(poses).squeeze(1), target)
    J = Engine(module).jacobian(losses)
    weights = UPGradWeighting()(J.gramian())
    J.backward(factor * weights.to(losses))


def _heard(module: nn.Module) -> Loss:
    engine, hearing = Engine(module), list[Listening]()

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        for last in hearing:  # whose backward is over, wherever the trainer has called it
            last.stop()
            assert bool((last.jacobian.norms() > 0).all())
        poses, target = batch
        losses = _squares(wrapped(poses).squeeze(1), target)
        hearing[:] = [engine.listen(losses)]
        hearing[0].start()
        return losses.mean()

    return loss


def _heard_by_hand(
    module: nn.Module, batch: Batch, factor: float, autocast: AbstractContextManager[Any]
) -> None:
    poses, target = batch
    with autocast:
        loss = _squares(module(poses).squeeze(1), target).mean()
    (factor * loss).backward()


WAYS = {
    "combine": Way(lambda: MultiPose(network(), Boltzmann(0.6)), _combined, _combined_by_hand),
    "engine.loss": Way(network, _ruled, _ruled_by_hand),
    "engine.listen": Way(network, _heard, _heard_by_hand),
}
SETTINGS = {
    "plain": Setting(),
    "accumulation": Setting(accumulated=2),
    "bfloat16": Setting(half=True),
}
CELLS = [(way, setting) for way in WAYS for setting in SETTINGS]


class Cell:
    """One cell of the table, for a number of processes.

    Args:
        way: Its name in `WAYS`.
        setting: Its name in `SETTINGS`.
        ranks: How many processes there are.
    """

    def __init__(self, way: str, setting: str, ranks: int = 1) -> None:
        self.way, self.setting, self.ranks = WAYS[way], SETTINGS[setting], ranks

    def module(self) -> nn.Module:
        """What the trainer holds, always the same."""
        return self.way.module().to(self.setting.dtype)

    def batches(self) -> list[Batch]:
        """Those of all steps and ranks, in the order in which ranks take them in turns."""
        count = STEPS * self.setting.accumulated * self.ranks
        numbers = seeded(3)
        poses = torch.randn(count, 5, FEATURES, generator=numbers, dtype=torch.float64)
        targets = torch.randn(count, generator=numbers, dtype=torch.float64)
        dtype = self.setting.dtype
        return [(X.to(dtype), y.to(dtype)) for X, y in zip(poses, targets, strict=True)]

    def by_hand(self) -> nn.Module:
        """What comes out without a trainer, in one process."""
        module, size = self.module(), self.setting.accumulated * self.ranks
        optimizer, batches = optimizer_of(module.parameters()), self.batches()
        for start in range(0, len(batches), size):
            optimizer.zero_grad()
            for batch in batches[start : start + size]:
                self.way.by_hand(module, batch, 1 / size, self.setting.autocast())
            optimizer.step()
        return module

    def assert_trained(self, module: nn.Module) -> None:
        """The same parameters as by hand: to 1e-12, or as far as bfloat16 tells.

        Of parameters in bfloat16 it is the way they went since the start that must agree.
        """
        rows = zip(
            module.parameters(),
            self.by_hand().parameters(),
            self.module().parameters(),
            strict=True,
        )
        for found, expected, before in rows:
            if self.setting.half:
                assert not torch.equal(found, before)
                scale = float((expected - before).detach().abs().max())
                torch.testing.assert_close(
                    found - before, expected - before, rtol=5e-2, atol=5e-2 * scale
                )
            else:
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """One with momentum, so that steps depend on those before."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
