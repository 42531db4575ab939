"""The methods, rules, model and poses that the suites share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, Predict, Rule
from examples.docked_poses.arrays import KT, Pose, by_ligand, load_all
from examples.docked_poses.network import schnet
from posegrad import Boltzmann, Engine, Mean, Min
from posegrad.combination import Combination

__all__ = ["METHODS", "RULES", "Bound", "distinct_poses", "model"]

Bound = Callable[[Sequence[Any], Rule, float], Tensor]


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
    **{f"posegrad {s}": partial(_posegrad, s) for s in ("auto", "stream", "recompute")},
}
"""How each method is bound to a model: a peer's step, or an engine made once."""

RULES: dict[str, Callable[[], Combination]] = {
    "Min(1000)": lambda: Min(scale=1000.0),
    "Min(1/kT)": lambda: Min(scale=1.0 / KT),
    "Boltzmann(kT)": lambda: Boltzmann(kT=KT),
    "Mean": Mean,
}
"""Every method combines by posegrad's own rule, so that only the schemes differ."""


def model() -> nn.Module:
    """PyG SchNet, 128 channels, 6 interactions, 50 Gaussians, cutoff 5 Å; always the same one."""
    torch.manual_seed(0)
    return schnet()


def distinct_poses(m: int) -> list[Pose]:
    """The first `m` poses of the largest ligand groups, target by target in turn: never one twice.

    Raises:
        ValueError: if the data hold fewer poses.
    """
    rank: dict[str, int] = {}
    turns = []
    for group in sorted(by_ligand(load_all()), key=len, reverse=True):
        target = group[0].target
        rank[target] = rank.get(target, -1) + 1
        turns.append((-len(group), rank[target], group))
    turns.sort(key=lambda turn: turn[:2])
    pooled = [pose for _, _, group in turns for pose in group]
    if m > len(pooled):
        raise ValueError(f"{m} distinct poses asked for, the data hold {len(pooled)}")
    return pooled[:m]
