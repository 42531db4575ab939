"""What a step on one bag costs, beside plain autograd in the same chunks."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.bags.digits import Bag
from examples.bags.network import Attention, encoder
from examples.bags.training import CHUNK, Classifier, loss_of
from posegrad.testing import peak_live_bytes

__all__ = ["Cost", "Step", "measure", "plain", "through_posegrad"]

Step = Callable[[Classifier, Bag], None]
"""Adds the gradient of a bag's loss to the `.grad` of encoder and rule."""


def plain(classifier: Classifier, bag: Bag) -> None:
    """Keeps the graphs of all chunks until the backward."""
    chunks = bag.images.pixels.split(CHUNK)
    features = torch.cat([classifier.network(chunk) for chunk in chunks])
    loss_of(classifier.rule(features)[None], [bag]).backward()


def through_posegrad(classifier: Classifier, bag: Bag) -> None:
    """Keeps the features, and scores each chunk again in the backward."""
    loss_of(classifier([bag]).prediction, [bag]).backward()


STEPS: dict[str, Step] = {"plain autograd": plain, "posegrad": through_posegrad}


@dataclass(frozen=True)
class Cost:
    """What one way of taking a step costs.

    Attributes:
        method: Whose way it is.
        peak_mib: Most memory held by tensors at once, beyond network and bag, MiB.
        of_plain: CPU time as a ratio to plain autograd, median of rounds taken in turns.
        difference: Largest difference from plain autograd among gradients and batch statistics,
            relative to the largest entry of each; both drop out the same numbers.
    """

    method: str
    peak_mib: float
    of_plain: float
    difference: float


def measure(bag: Bag, *, rounds: int = 3) -> list[Cost]:
    """Takes the same step each way, from the same weights and random numbers."""
    torch.manual_seed(0)
    modules = encoder(), Attention()
    classifiers = {name: Classifier(*copy.deepcopy(modules)) for name in STEPS}
    peaks, states = {}, {}
    for name, step in STEPS.items():
        torch.manual_seed(1)
        with peak_live_bytes() as peak:
            step(classifiers[name], bag)
        peaks[name], states[name] = peak.bytes / 2**20, _left_behind(classifiers[name])
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, step in STEPS.items():
            start = time.process_time()
            step(classifiers[name], bag)
            seconds[name].append(time.process_time() - start)
    base = seconds["plain autograd"]
    return [
        Cost(
            name,
            peaks[name],
            statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)),
            _difference(states[name], states["plain autograd"]),
        )
        for name in STEPS
    ]


def _left_behind(classifier: Classifier) -> list[Tensor]:
    """Gradients and buffers."""
    gradients = [p.grad.clone() for p in classifier.parameters() if p.grad is not None]
    return gradients + [buffer.double() for buffer in classifier.network.buffers()]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
