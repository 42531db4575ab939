"""One training step on `m` poses of one compound: every scheme side by side.

Time: all methods in one process, round after round in changing order, so that a slow minute hits
all of them; what counts is the ratio to plain autograd within a round. Memory: a fresh process for
each case. Gradients: against plain autograd in float64, in the same run.

The limit is what no exact scheme can avoid: one forward for each pose and one backward for each
pose whose weight is not zero, both measured here. Denormals are flushed: SchNet's Gaussians
underflow, and backward through denormals takes up to ten times as long.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.exact import largest_difference
from benchmarks.memory import TARGET, measure
from benchmarks.methods import METHODS, RULES, Bound, distinct_poses, model
from benchmarks.peers import checkpoint, plain
from benchmarks.rounds import CLOCKS, Clock, prepare, seconds, shuffled
from examples.docked_poses.arrays import Pose
from examples.docked_poses.network import score

__all__ = ["run"]

LARGEST_PLAIN_FLOAT64 = 64  # poses; beyond, graphs in float64 want tens of GiB

LIMIT = "limit"

Row = dict[str, Any]


def run(
    sizes: Sequence[int],
    rules: Sequence[str],
    *,
    rounds: int = 3,
    threads: int = 1,
    clock: str = "wall",
    memory: bool = True,
) -> dict[str, Any]:
    """Run the suite.

    Args:
        sizes: Numbers of poses.
        rules: Names out of `RULES`.
        rounds: How often each case is timed.
        threads: Threads of torch.
        clock: One of `CLOCKS`.
        memory: Whether to measure peak memory, which starts a process for each case.

    Returns:
        What goes into the JSON file: environment, and one row for each case with its raw seconds.
    """
    prepare(threads)
    suite = _Suite(model(), CLOCKS[clock])
    cases = len(sizes) * len(rules) * len(METHODS)
    with tqdm(total=cases * (rounds + memory) + cases // len(METHODS)) as bar:
        rows, limits = [], []
        for m in sizes:
            timed, floor = suite.time(m, rules, rounds, bar)
            rows += timed
            limits += floor
        if memory:
            for row in rows:
                bar.set_description(f"memory, {row['poses']} poses, {row['rule']}")
                row |= measure(row["method"], row["rule"], row["poses"], threads=threads)
                bar.update()
    settings = {"suite": "multipose", "model": "PyG SchNet", "rounds": rounds, "clock": clock}
    return {**settings, "environment": environment(), "rows": rows, "limits": limits}


@dataclass(frozen=True)
class _Method:
    network: nn.Module
    step: Bound


class _Suite:
    def __init__(self, network: nn.Module, now: Clock) -> None:
        self.network, self.now = network, now
        # A copy for each method: nothing one of them hangs on its model slows another.
        copies = {name: copy.deepcopy(network) for name in METHODS}
        self.methods = {
            n: _Method(copies[n], bind(copies[n], score)) for n, bind in METHODS.items()
        }

    def time(
        self, m: int, rules: Sequence[str], rounds: int, bar: "tqdm[Any]"
    ) -> tuple[list[Row], list[Row]]:
        """Timed rows and limits of one number of poses."""
        poses = distinct_poses(m)
        floors = [_Floor(rule, m) for rule in rules]
        rows = {(r, n): _row(m, r, n) for r in rules for n in self.methods}
        for rule in rules:
            bar.set_description(f"float64 reference, {m} poses, {rule}")
            self._compare(poses, rule, {n: rows[rule, n] for n in self.methods})
            bar.update()
        for turn in range(rounds):
            for rule, floor in zip(rules, floors, strict=True):
                bar.set_description(f"round {turn + 1}, {m} poses, {rule}")
                for name in shuffled([*self.methods, LIMIT], turn):
                    if name == LIMIT:
                        floor.add(*_floor_times(self.network, poses, self.now))
                    else:
                        rows[rule, name]["seconds"].append(self._seconds(name, poses, rule))
                        bar.update()
        return list(rows.values()), [floor.row() for floor in floors]

    def _seconds(self, name: str, poses: list[Pose], rule: str) -> float:
        method, combine = self.methods[name], RULES[rule]()
        method.network.zero_grad()
        return seconds(partial(method.step, poses, combine, TARGET), self.now)

    def _compare(self, poses: list[Pose], rule: str, rows: dict[str, Row]) -> None:
        """Largest relative difference of each method's gradient from float64; warms all up."""
        exact = _reference(self.network, poses, rule)
        for name, method in self.methods.items():
            method.network.zero_grad()
            method.step(poses, RULES[rule](), TARGET)
            rows[name]["gradient_error"] = largest_difference(_gradients(method.network), exact)


class _Floor:
    """The limit of one rule: `m` forwards, and the backwards of poses with nonzero weight."""

    def __init__(self, rule: str, m: int) -> None:
        self.rule, self.m, self.needed = rule, m, 0
        self.forwards: list[float] = []
        self.limit: list[float] = []

    def add(self, forwards: float, backwards: list[float], predictions: Tensor) -> None:
        needed = RULES[self.rule]().weights(predictions).ne(0).tolist()  # [m]
        self.needed = sum(needed)
        self.forwards.append(forwards)
        self.limit.append(forwards + sum(b for b, n in zip(backwards, needed, strict=True) if n))

    def row(self) -> Row:
        return {
            "poses": self.m,
            "rule": self.rule,
            "backwards_needed": self.needed,
            "forwards_seconds": self.forwards,
            "limit_seconds": self.limit,
        }


def _row(m: int, rule: str, method: str) -> Row:
    return {"poses": m, "rule": rule, "method": method, "seconds": []}


def _floor_times(
    network: nn.Module, poses: list[Pose], now: Clock
) -> tuple[float, list[float], Tensor]:
    """Seconds of the forwards without graph, of each backward, and the predictions `[m]`."""
    start = now()
    with torch.no_grad():
        predictions = torch.stack([score(network, pose) for pose in poses])  # [m]
    forwards = now() - start

    backwards = []
    network.zero_grad()
    for pose in poses:
        prediction = score(network, pose)
        start = now()
        prediction.backward()
        backwards.append(now() - start)
    network.zero_grad()
    return forwards, backwards, predictions


def _reference(network: nn.Module, poses: list[Pose], rule: str) -> dict[str, Tensor]:
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    step = plain if len(poses) <= LARGEST_PLAIN_FLOAT64 else checkpoint
    step(exact, score, [replace(p, xyz=p.xyz.double()) for p in poses], RULES[rule](), TARGET)
    return _gradients(exact)


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.double() for n, p in network.named_parameters() if p.grad is not None}
