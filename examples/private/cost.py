"""What a step costs each way: time side by side, and memory."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from examples.private.network import network
from examples.private.step import Settings, Step
from examples.private.ways import WAYS
from posegrad.testing import peak_live_bytes

__all__ = ["Cost", "measure"]


@dataclass(frozen=True)
class Cost:
    """What one way of taking a step costs.

    Attributes:
        of_plain: CPU time as a ratio to a step without privacy, median of rounds taken in turns.
        peak_mib: Most memory held by tensors at once, beyond network and images, MiB.
    """

    of_plain: float
    peak_mib: float


def measure(data: TensorDataset, settings: Settings, *, rounds: int) -> dict[str, Cost]:
    """Takes steps on the same images each way, in turns: forward, backward, noise, descent.

    Args:
        data: Of which the first images are taken, as many as are expected in a step.
        settings: Of the step.
        rounds: Steps of each way that are timed.
    """
    steps = {name: way(network(), data, settings).step for name, way in WAYS.items()}
    batch = data[: settings.expected]
    for step in steps.values():
        for _ in range(3):  # what is made in a first step and kept is not its cost
            step(*batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step(*batch)
            seconds[name].append(time.process_time() - start)
    base = seconds["not private"]
    return {
        name: Cost(
            statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)),
            _peak(step, *batch),
        )
        for name, step in steps.items()
    }


def _peak(step: Step, images: torch.Tensor, digits: torch.Tensor) -> float:
    with peak_live_bytes() as peak:
        step(images, digits)
    return peak.bytes / 2**20
