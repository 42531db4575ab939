"""The methods and rules of the suites that train on a group of poses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.peers import PEERS, Predict, Rule
from examples.docked_poses.arrays import KT
from posegrad import Boltzmann, Engine, Mean, Min
from posegrad.combination import Combination

__all__ = ["METHODS", "RULES", "TARGET", "Bound"]

Bound = Callable[[Sequence[Any], Rule, float], Tensor]

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

RULES: dict[str, Callable[[], Combination]] = {
    "Min(1000)": lambda: Min(scale=1000.0),
    "Min(1/kT)": lambda: Min(scale=1.0 / KT),
    "Boltzmann(kT)": lambda: Boltzmann(kT=KT),
    "Mean": Mean,
}
"""Every method combines by posegrad's own rule, so that only the schemes differ."""
