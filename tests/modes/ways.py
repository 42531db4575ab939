"""The ways to a gradient, each beside plain autograd."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import UPGrad, UPGradWeighting

from posegrad import Boltzmann, Clip
from tests.modes.run import Found, Run, Step, rows_of
from tests.schedules import SCHEDULES

__all__ = ["COMBINE", "JACOBIAN", "WAYS", "Way"]

MAX_NORM = 4.0  # some poses' gradients are shorter, some longer


@dataclass(frozen=True)
class Way:
    """One way to a gradient.

    Args:
        ours: By the engine.
        plain: The same by plain autograd.
        has_rule: Whether there is a rule in it.
    """

    ours: Step
    plain: Step
    has_rule: bool = True


def _combined(schedule: str) -> Step:
    def step(run: Run) -> Found:
        rule = run.mode.rule(Boltzmann(0.6))
        engine = run.engine
        with run.mode.forward():
            prediction, _ = engine.combine(run.poses, rule, schedule=schedule)
        run.scale(run.loss(prediction)).backward()
        return {}

    return step


def _combined_plainly(run: Run) -> Found:
    run.scale(run.loss(Boltzmann(0.6)(run.scored()))).backward()
    return {}


def _embedded(run: Run) -> Found:
    engine = run.engine
    with run.mode.forward():
        embeddings = engine.embed(run.poses)
    losses = run.loss_of(embeddings, torch.arange(len(run.poses)))
    run.scale((losses * run.weights).sum()).backward()
    return {}


def _product(run: Run) -> Found:
    """J.combine(w), put into .grad by hand."""
    found = run.engine.jacobian(run.losses()).combine(run.weights)
    for name, parameter in run.model.named_parameters():
        parameter.grad = run.scale(found[name]).to(parameter.dtype)
    return {}


def _backward(run: Run) -> Found:
    run.engine.jacobian(run.losses()).backward(run.weights, scaler=run.scaler)
    return {}


def _gathered(run: Run) -> Found:
    engine = run.engine
    with run.mode.forward():
        J = engine.gather(run.poses, loss=run.loss_of)
    J.backward(run.weights, scaler=run.scaler)
    return {}


def _weighted_plainly(run: Run) -> Found:
    run.scale((run.losses() * run.weights).sum()).backward()
    return {}


def _gathered_plainly(run: Run) -> Found:
    losses = run.loss_of(run.scored(), torch.arange(len(run.poses)))
    run.scale((losses * run.weights).sum()).backward()
    return {}


def _gramian(run: Run) -> Found:
    J = run.engine.jacobian(run.losses())
    G = J.gramian()
    J.backward(run.weights, scaler=run.scaler)
    return {"G": G}


def _gramian_of_the_seed(run: Run) -> Found:
    """The graph is kept: a plain backward comes after."""
    losses = run.losses()
    G = run.engine.compute_gramian(losses)
    run.scale(losses * run.weights).sum().backward()
    return {"G": G}


def _gramian_plainly(run: Run) -> Found:
    losses = run.losses()
    J = rows_of(losses, run)
    run.scale(losses * run.weights).sum().backward()
    return {"G": J @ J.T}


def _ruled(make: Any) -> Step:
    def step(run: Run) -> Found:
        engine = run.engine
        engine.backward(run.losses(), run.mode.rule(make()), scaler=run.scaler)
        return {}

    return step


def _lost(make: Any) -> Step:
    def step(run: Run) -> Found:
        loss = run.engine.loss(run.losses(), run.mode.rule(make()))
        run.scale(loss).backward()
        return {}

    return step


def _ruled_plainly(weights_of: Any) -> Step:
    def step(run: Run) -> Found:
        losses = run.losses()
        J = rows_of(losses, run)
        weights = weights_of(J @ J.T).to(losses.dtype)
        run.scale((losses * weights).sum()).backward()
        return {}

    return step


def _clipping(gramian: Tensor) -> Tensor:
    return (MAX_NORM / gramian.diagonal().sqrt()).clamp(max=1)


COMBINE: dict[str, Way] = {
    schedule: Way(_combined(schedule), _combined_plainly) for schedule in (*SCHEDULES, "auto")
} | {"embed": Way(_embedded, _gathered_plainly, has_rule=False)}

JACOBIAN: dict[str, Way] = {
    "J.combine(w)": Way(_product, _weighted_plainly, has_rule=False),
    "J.backward(w)": Way(_backward, _weighted_plainly, has_rule=False),
    "gather(poses)": Way(_gathered, _gathered_plainly, has_rule=False),
    "J.gramian()": Way(_gramian, _gramian_plainly, has_rule=False),
    "compute_gramian": Way(_gramian_of_the_seed, _gramian_plainly, has_rule=False),
    "backward(Clip)": Way(_ruled(lambda: Clip(MAX_NORM)), _ruled_plainly(_clipping)),
    "backward(UPGrad)": Way(_ruled(UPGrad), _ruled_plainly(UPGradWeighting())),
    "loss(Clip)": Way(_lost(lambda: Clip(MAX_NORM)), _ruled_plainly(_clipping)),
    "loss(UPGrad)": Way(_lost(UPGrad), _ruled_plainly(UPGradWeighting())),
}

WAYS = COMBINE | JACOBIAN
