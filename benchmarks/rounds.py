"""Timing side by side: one process, round after round, in another order each round.

A slow minute of a shared machine so hits all methods alike; what counts is the ratio within a
round.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["CLOCKS", "Clock", "interleaved", "seconds", "shuffled"]

Clock = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)

SHORTEST = 0.2  # seconds; what takes less is called several times in a row, as in training


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Clock] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
    "gpu": _synchronized,
}
"""`cpu` is the processor time of this process, which on a machine shared with others says more.
With several threads it adds them up. `gpu` waits until the GPU is done."""


def shuffled(names: Sequence[Key], turn: int) -> list[Key]:
    """Another order each round: a method's neighbours leave it memory and caches."""
    return random.Random(turn).sample(names, len(names))


def seconds(call: Callable[[], object], now: Clock, *, times: int = 1) -> float:
    """Seconds of one call, the mean of several in a row; what it returns is dropped at once."""
    gc.collect()
    start = now()
    for _ in range(times):
        call()
    return (now() - start) / times


def interleaved(
    calls: Mapping[Key, Callable[[], object]], rounds: int, now: Clock, *, least: float = 0.0
) -> dict[Key, list[float]]:
    """Seconds of each call, round by round.

    Args:
        calls: What to time. Each is called once before the first round, to learn how long it takes.
        rounds: How often each is timed, at least.
        now: One of `CLOCKS`.
        least: For how many seconds, at least: rounds of short calls differ more, and cost less.
    """
    once = {key: seconds(call, now) for key, call in calls.items()}
    times = {key: _repeats(taken) for key, taken in once.items()}
    rounds = max(rounds, math.ceil(least / sum(times[key] * once[key] for key in calls)))
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(rounds):
        for key in shuffled(list(calls), turn):
            found[key].append(seconds(calls[key], now, times=times[key]))
    return found


def _repeats(once: float) -> int:
    return math.ceil(SHORTEST / max(once, SHORTEST / 100))
