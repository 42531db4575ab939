"""Bags of patches and pairs of embeddings: one training step, every way side by side.

A bag of 1000 patches through a convolutional network, pooled by gated attention or by the mean of
its eight best scores; and 512 pairs through two encoders with dropout, under InfoNCE. Every way
scores the same chunks, so all draw the same random numbers, and gradients are compared with plain
autograd in float64. Time and memory as in the suite `multipose`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.bags_cases import CASES, Task
from benchmarks.bags_ways import WAYS, Way
from benchmarks.exact import gradients, largest_difference
from benchmarks.rounds import interleaved
from benchmarks.settings import Memory, Row, Settings

__all__ = ["CASES", "MEMORY", "run"]

MEMORY = Memory("benchmarks.bags_memory", ("case", "method"))


def run(cases: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        cases: Names out of `CASES`.
        settings: How.

    Returns:
        What goes into the JSON file: a row for each case and way.
    """
    settings.prepare()
    rows: list[Row] = []
    for name in tqdm(cases):
        task = CASES[name].make().to(settings.device)
        steps = {way: _step(WAYS[way], task) for way in CASES[name].ways}
        exact = _gradients(*_step(WAYS["plain"], task.to(torch.float64)))
        found = {way: _gradients(*step) for way, step in steps.items()}
        calls = {way: partial(_timed, *step) for way, step in steps.items()}
        for way, seconds in interleaved(calls, settings.rounds, settings.stopwatch).items():
            row = {"case": name, "method": way, "seconds": seconds}
            row["gradient_error"] = largest_difference(found[way], exact)
            row["from_plain"] = largest_difference(found[way], found["plain"])
            rows.append(row)
    texts = {name: CASES[name].text for name in cases}
    sizes = {name: CASES[name].make().chunk_size for name in cases}
    return settings.result("bags", rows, cases=texts, chunk_sizes=sizes)


def _step(way: Way, task: Task) -> tuple[nn.Module, Callable[[], None]]:
    """A way bound to a copy of the networks, which it may hang things on."""
    own = replace(task, networks=copy.deepcopy(task.networks), rule=copy.deepcopy(task.rule))
    return own.trained(), way(own)


def _timed(trained: nn.Module, step: Callable[[], None]) -> None:
    trained.zero_grad()
    step()


def _gradients(trained: nn.Module, step: Callable[[], None]) -> Mapping[str, Tensor]:
    """Those of a step from one seed, the second one: a first may look closer."""
    for _ in range(2):
        torch.manual_seed(0)
        _timed(trained, step)
    return {name: g.clone() for name, g in gradients(trained).items()}
