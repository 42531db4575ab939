"""What a library costs a training step that does not use it.

A plain step (forward, backward, SGD) of a network that a library follows, as a ratio to the step of
one that none does: posegrad with a live `Engine` that was used, TorchJD with a live engine that was
used and hooks modules, and Opacus's wrapper, which computes the rows of every backward and needs an
attention made of linear layers.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.cases import CASES, Problem
from benchmarks.opacus_ways import hooked
from benchmarks.per_pose import posegrad
from benchmarks.rounds import interleaved
from benchmarks.settings import Row, Settings
from benchmarks.tasks import missing
from benchmarks.torchjd_ways import torchjd

__all__ = ["NETWORKS", "run"]

Follow = Callable[[Problem], tuple[nn.Module, Any]]


def _deep(m: int) -> Problem:
    """Ten layers of width 64: a step whose time is that of its calls."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return Problem(nn.Sequential(*hidden, nn.Linear(64, 1)), (torch.randn(m, 64),), m)


NETWORKS: dict[str, tuple[str, Callable[[], Problem]]] = {
    "encoder-16": (CASES["encoder-16"].text, lambda: CASES["encoder-16"].make(16)),
    "deep-16": ("MLP of 10 layers, width 64", lambda: _deep(16)),
}


def _alone(problem: Problem) -> tuple[nn.Module, Any]:
    return problem.network, None


def _posegrad(problem: Problem) -> tuple[nn.Module, Any]:
    step = posegrad(problem.network)
    step(problem)
    return problem.network, step  # which holds the engine


def _torchjd(problem: Problem) -> tuple[nn.Module, Any]:
    step = torchjd(0, problem.network)
    step(problem)
    return problem.network, step


def _opacus(problem: Problem) -> tuple[nn.Module, Any]:
    return hooked(problem.network), None


FOLLOWED: dict[str, tuple[Follow, str | None]] = {
    "alone": (_alone, None),
    "posegrad": (_posegrad, None),
    "TorchJD": (_torchjd, "torchjd"),
    "Opacus": (_opacus, "opacus"),
}


def run(networks: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run the suite.

    Args:
        networks: Names out of `NETWORKS`.
        settings: How.

    Returns:
        What goes into the JSON file: one row for each network and library.
    """
    settings.prepare()
    absent = missing()
    rows: list[Row] = []
    for name in tqdm(networks):
        text, make = NETWORKS[name]
        problem = make().to(settings.device)
        libraries = {n: f for n, (f, package) in FOLLOWED.items() if package not in absent}
        steps = {library: _step(problem, follow) for library, follow in libraries.items()}
        for library, seconds in interleaved(steps, settings.rounds, settings.stopwatch).items():
            rows.append({"network": text, "library": library, "seconds": seconds})
    return settings.result("overhead", rows, missing=absent)


def _step(problem: Problem, follow: Follow) -> Callable[[], object]:
    own = replace(problem, network=copy.deepcopy(problem.network))
    network, held = follow(own)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    return partial(_train, network, problem, optimizer, held)


def _train(
    network: nn.Module, problem: Problem, optimizer: torch.optim.Optimizer, held: Any
) -> None:
    """One step; `held` keeps what follows the network alive."""
    network.zero_grad()  # Opacus's wrapper drops its rows here, and nowhere else
    network(*problem.inputs).sum().backward()
    optimizer.step()
