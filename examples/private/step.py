"""The step: clip, add noise, divide by the expected number of images, descend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from posegrad import Clip, Engine

__all__ = ["Settings", "Step", "plain_step", "private_step"]

Step = Callable[[Tensor, Tensor], None]
"""Takes images and what they show, and moves the parameters."""


@dataclass(frozen=True)
class Settings:
    """What all ways to train have in common.

    Attributes:
        noise: σ, the noise in units of `max_norm`.
        max_norm: C, the greatest norm of one image's gradient.
        expected: Images in a step, on average.
        rate: The learning rate.
        momentum: Of the optimizer.
        seed: Of the draws of images, and of the noise.
    """

    noise: float
    max_norm: float = 1.0
    expected: int = 240
    rate: float = 0.1
    momentum: float = 0.9
    seed: int = 1

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Stochastic gradient descent."""
        return torch.optim.SGD(network.parameters(), lr=self.rate, momentum=self.momentum)

    def generator(self) -> torch.Generator:
        """A new one, at the seed."""
        return torch.Generator().manual_seed(self.seed)


def private_step(network: nn.Module, settings: Settings) -> Step:
    """DP-SGD."""
    engine, optimizer = Engine(network), settings.optimizer(network)
    rule = Clip(settings.max_norm, noise_multiplier=settings.noise, generator=settings.generator())

    def step(images: Tensor, digits: Tensor) -> None:
        losses = F.cross_entropy(network(images), digits, reduction="none")  # [m]
        optimizer.zero_grad()
        (engine.loss(losses, rule) / settings.expected).backward()
        optimizer.step()

    return step


def plain_step(network: nn.Module, settings: Settings) -> Step:
    """Neither clipping nor noise."""
    optimizer = settings.optimizer(network)

    def step(images: Tensor, digits: Tensor) -> None:
        loss = F.cross_entropy(network(images), digits, reduction="sum")
        optimizer.zero_grad()
        (loss / settings.expected).backward()
        optimizer.step()

    return step
