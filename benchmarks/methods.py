"""The methods and rules of the suites that train on a group of poses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import Batch

from benchmarks.peers import PEERS, Predict, Rule
from examples.docked_poses.arrays import KT
from posegrad import Boltzmann, Engine, Mean, Min
from posegrad.combination import Combination

__all__ = ["JOINED", "METHODS", "RULES", "SIDE_BY_SIDE", "TARGET", "Bound"]

Bound = Callable[[Any, Rule, float], Tensor]

CHUNK = 8  # joined poses that a peer scores at once

TARGET = -9.0  # kcal/mol, the measured energy


def _posegrad(schedule: str, model: nn.Module, predict: Predict) -> Bound:
    engine = Engine(model, predict=predict)

    def step(poses: Sequence[Any], rule: Rule, target: float) -> Tensor:
        prediction, _ = engine.combine(poses, rule, schedule=schedule)
        (prediction - target).square().backward()
        return prediction.detach()

    return step


def _peer(name: str, model: nn.Module, predict: Predict) -> Bound:
    return partial(PEERS[name], model, predict)


METHODS: dict[str, Callable[[nn.Module, Predict], Bound]] = {
    **{name: partial(_peer, name) for name in PEERS},
    **{f"posegrad {s}": partial(_posegrad, s) for s in ("auto", "stream", "recompute", "store")},
}
"""How each method is bound to a model: a peer's step, or an engine made once."""


def _in_chunks(name: str, size: int, model: nn.Module, predict: Predict) -> Bound:
    """A peer that scores joined poses, some at once; they are divided once for all steps."""
    divided: dict[int, tuple[Batch, list[Batch]]] = {}

    def step(poses: Batch, rule: Rule, target: float) -> Tensor:
        _, chunks = divided.setdefault(id(poses), (poses, _divided(poses, size)))
        return PEERS[name](model, predict, chunks, rule, target)

    return step


def _divided(poses: Batch, size: int) -> list[Batch]:
    count = poses.num_graphs
    if size >= count:
        return [poses]
    graphs = poses.to_data_list()
    return [Batch.from_data_list(graphs[i : i + size]) for i in range(0, count, size)]


JOINED: dict[str, Callable[[nn.Module, Predict], Bound]] = {
    "plain": partial(_in_chunks, "plain", 2**20),
    "checkpoint": partial(_in_chunks, "checkpoint", CHUNK),
    "mtenn scheme": partial(_in_chunks, "mtenn scheme", 1),
    "two passes": partial(_in_chunks, "two passes", CHUNK),
    "posegrad auto": partial(_posegrad, "auto"),
}
"""Likewise for poses that come joined: all at once, in chunks of eight, or one by one."""

SIDE_BY_SIDE = ("plain", "checkpoint", "mtenn scheme", "two passes", "posegrad auto")
"""The methods that take a list and a batch."""

RULES: dict[str, Callable[[], Combination]] = {
    "Min(1000)": lambda: Min(scale=1000.0),
    "Min(1/kT)": lambda: Min(scale=1.0 / KT),
    "Boltzmann(kT)": lambda: Boltzmann(kT=KT),
    "Mean": Mean,
}
"""Every method combines by posegrad's own rule, so that only the schemes differ."""
