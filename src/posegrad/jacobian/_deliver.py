"""Gradients that were computed elsewhere, handed to parameters as a backward would."""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad._torch import backward_into_leaves
from posegrad.errors import NonFiniteGradientError
from posegrad.weighting._base import GradientRule, Jacobian
from posegrad.weighting._rules import OfPredictions

__all__ = ["deliver", "deliver_step", "deposit", "step_of"]

_PROBE = [object()]
_HELD_BY_A_LIST = sys.getrefcount(_PROBE[0])


def step_of(
    rule: GradientRule, jacobian: Jacobian, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a rule makes of a Jacobian, times the scale that a scaler will divide by.

    Returns:
        The gradients, in a dict that is nobody else's, and the weights.

    Rows that are nan or infinite are no error to a scaler, which skips the step and goes on with a
    lower scale: it is shown a gradient of nan.
    """
    if scaler is None or not scaler.is_enabled():
        gradients, weights = rule.step(jacobian)
        return dict(gradients), weights
    predictions = jacobian.predictions
    scale = scaler.scale(torch.ones((), device=predictions.device)).item()
    if isinstance(rule, OfPredictions):
        rule = OfPredictions(rule.rule, scale=scale)
    try:
        gradients, weights = rule.step(jacobian)
    except NonFiniteGradientError:
        weights = torch.full_like(predictions, torch.nan)
        shapes = jacobian.shapes
        gradients = {name: weights.new_full(shapes[name], torch.nan) for name in jacobian.used}
    return {name: scale * gradient for name, gradient in gradients.items()}, weights


@restoring
def deliver_step(
    rule: GradientRule,
    jacobian: Jacobian,
    parameters: Mapping[str, Tensor],
    scaler: torch.amp.GradScaler | None,
) -> Tensor | None:
    """Adds what a rule makes of a Jacobian to `.grad`; returns the weights."""
    gradients, weights = step_of(rule, jacobian, scaler)
    deposit(gradients, parameters)
    return weights


def deposit(gradients: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Adds gradients to the `.grad` of the parameters of the same names that are still trained.

    Args:
        gradients: By name; the dict is emptied, so that nobody else holds them.
        parameters: By name.
    """
    named = [name for name in gradients if parameters[name].requires_grad]  # frozen since?
    places = [parameters[name] for name in named]
    ready = [gradients[n].to(p.device, p.dtype) for n, p in zip(named, places, strict=True)]
    gradients.clear()
    deliver(places, ready)


def deliver(parameters: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Adds gradients to the `.grad` of parameters; their hooks run, once.

    `torch.autograd.backward(parameters, gradients)` would do the same and copy every one, because
    its caller still holds them. What the node of a view hands on is another tensor of the same
    numbers, which nobody holds: where there is no `.grad` yet, autograd keeps that itself. What it
    would not keep, it would copy while the original is held here; so that is copied before.

    Args:
        parameters: Leaves that require grad.
        gradients: One for each, of its shape, dtype and device; the list is emptied.
    """
    if not parameters:
        return
    for i, p in enumerate(parameters):
        # A rule may hold on to what it returned, or have returned it for two parameters.
        is_held = sys.getrefcount(gradients[i]) > _HELD_BY_A_LIST
        if is_held or gradients[i].stride() != p.stride():
            gradients[i] = torch.empty_like(p).copy_(gradients[i])
    with torch.enable_grad():
        views = tuple([p.view_as(p) for p in parameters])
    given = tuple(gradients)
    gradients.clear()
    backward_into_leaves(views, given)
