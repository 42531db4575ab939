"""Timing side by side: one process, round after round, in another order each round.

A slow minute of a shared machine so hits all methods alike; what counts is the ratio within a
round.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

__all__ = ["CLOCKS", "Stopwatch", "interleaved", "seconds", "shuffled"]

Stopwatch = Callable[[Callable[[], object]], float]  # a call to its seconds
Key = TypeVar("Key", bound=Hashable)

SHORTEST = 0.2  # seconds; what takes less is called several times in a row, as in training


def _elapsed(now: Callable[[], float], call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def _events(call: Callable[[], object]) -> float:
    """From the call's start on an idle GPU until the GPU has done all that the call asked for."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()  # else it would start when the GPU is done with what came before
    start.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


CLOCKS: dict[str, Stopwatch] = {
    "wall": partial(_elapsed, time.perf_counter),
    "cpu": partial(_elapsed, time.process_time),
    "gpu": _events,
}
"""`cpu` is the processor time of this process, which on a machine shared with others says more.
With several threads it adds them up. `gpu` goes by the GPU's own events."""


def shuffled(names: Sequence[Key], turn: int) -> list[Key]:
    """Another order each round: a method's neighbours leave it memory and caches."""
    return random.Random(turn).sample(names, len(names))


def seconds(call: Callable[[], object], stopwatch: Stopwatch, *, times: int = 1) -> float:
    """Seconds of one call, the mean of several in a row; what it returns is dropped at once."""

    def in_a_row() -> None:
        for _ in range(times):
            call()

    gc.collect()
    return stopwatch(in_a_row) / times


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    stopwatch: Stopwatch,
    *,
    least: float = 0.0,
) -> dict[Key, list[float]]:
    """Seconds of each call, round by round.

    Args:
        calls: What to time. Each is called once before the first round, to learn how long it takes.
        rounds: How often each is timed, at least.
        stopwatch: One of `CLOCKS`.
        least: For how many seconds, at least: rounds of short calls differ more, and cost less.
    """
    once = {key: seconds(call, stopwatch) for key, call in calls.items()}
    times = {key: _repeats(taken) for key, taken in once.items()}
    rounds = max(rounds, math.ceil(least / sum(times[key] * once[key] for key in calls)))
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(rounds):
        for key in shuffled(list(calls), turn):
            found[key].append(seconds(calls[key], stopwatch, times=times[key]))
    return found


def _repeats(once: float) -> int:
    return math.ceil(SHORTEST / max(once, SHORTEST / 100))
