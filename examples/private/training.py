"""Training one way, looked at after each epoch."""

from dataclasses import dataclass

import torch
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from examples.private.ways import DELTA, Prepared

__all__ = ["Epoch", "noise_for", "train"]


@dataclass(frozen=True)
class Epoch:
    """What is known at the end of one.

    Attributes:
        epsilon: What all steps so far cost; infinite without privacy.
        accuracy: On the images held out.
    """

    epsilon: float
    accuracy: float


def noise_for(epsilon: float, *, rate: float, epochs: int) -> float:
    """The noise with which so many epochs cost ε.

    Args:
        epsilon: What training may cost.
        rate: The probability with which an image takes part in a step.
        epochs: How long it trains.
    """
    sigma: float = get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=DELTA,
        sample_rate=rate,
        epochs=epochs,
        accountant="prv",
    )
    return sigma


def train(
    network: nn.Module, prepared: Prepared, held_out: TensorDataset, *, epochs: int, name: str
) -> list[Epoch]:
    """Trains, and returns what each epoch came to."""
    found = []
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for images, digits in prepared.loader:
            prepared.step(images, digits)
        found.append(Epoch(prepared.epsilon(), _accuracy(network, held_out)))
    return found


@torch.no_grad()
def _accuracy(network: nn.Module, data: TensorDataset) -> float:
    images, digits = data.tensors
    return float((network(images).argmax(1) == digits).float().mean())
