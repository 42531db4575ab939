"""A convolutional network that keeps images apart."""

import torch
from torch import nn

__all__ = ["network"]


def network(seed: int = 0) -> nn.Sequential:
    """From images `[m, 1, 8, 8]` to logits `[m, 10]`.

    Group norm, as batch norm would let each image move the gradients of the others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *_block(1, 32),
            *_block(32, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 64, 10),
        )


def _block(inside: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
