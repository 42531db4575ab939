"""Hands gradients computed elsewhere to the parameters, as a backward would."""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from posegrad._restoring import restoring
from posegrad._torch import backward_into_leaves, memory_of
from posegrad.errors import NonFiniteGradientError, NonFinitePredictionError, listed
from posegrad.jacobian._exchange import grad_apart
from posegrad.weighting._base import GradientRule, Jacobian, Step
from posegrad.weighting._rules import OfPredictions

__all__ = [
    "Gradient",
    "check_delivered",
    "deliver",
    "deliver_step",
    "deposit",
    "gradient_of",
    "owned",
]

_PROBE = [object()]
_HELD_BY_A_LIST = sys.getrefcount(_PROBE[0])


@final
class Gradient(NamedTuple):
    """What a rule makes of a Jacobian, before anything is added to `.grad`.

    Args:
        own: The gradients of the engine's parameters by name, in a dict that nobody else holds.
        weights: As in a `Step`.
        of_rule: The gradients of the rule's own parameters, by name.
        trained: The rule's own parameters.
    """

    own: dict[str, Tensor]
    weights: Tensor | None
    of_rule: dict[str, Tensor]
    trained: dict[str, nn.Parameter]


def gradient_of(
    rule: GradientRule,
    jacobian: Jacobian,
    *,
    scaler: torch.amp.GradScaler | None = None,
    or_nan: bool = False,
) -> Gradient:
    """The gradients that a rule makes, including its own parameters'; `.grad` stays untouched.

    Args:
        rule: The rule.
        jacobian: The rows.
        scaler: The gradient is multiplied by its scale. With a scaler, rows that are nan or
            infinite are no error: it skips the step and goes on with a lower scale.
        or_nan: Whether such rows give a gradient of nan even without a scaler.
    """
    trained = {name: p for name, p in rule.named_parameters() if p.requires_grad}
    scales = scaler is not None and scaler.is_enabled()
    try:
        (own, weights), of_rule = _apart(rule, jacobian, trained)
    except (NonFiniteGradientError, NonFinitePredictionError):
        if not scales and not or_nan:
            raise
        (own, weights), of_rule = _lost(jacobian), {}
    own = dict(own)
    if scaler is not None and scales:
        scale = scaler.scale(torch.ones((), device=jacobian.predictions.device)).item()
        own = {name: scale * gradient for name, gradient in own.items()}
        of_rule = {name: scale * gradient for name, gradient in of_rule.items()}
    return Gradient(own, weights, of_rule, trained)


def _apart(
    rule: GradientRule, jacobian: Jacobian, trained: Mapping[str, Tensor]
) -> tuple[Step, dict[str, Tensor]]:
    """A rule's step, and the gradients of its own parameters, by name."""
    if isinstance(rule, OfPredictions):
        return rule.trained_step(jacobian)
    with grad_apart(trained) as of_rule:  # catches what a user's own rule adds there
        step = rule.step(jacobian)
    return step, of_rule


def _lost(jacobian: Jacobian) -> Step:
    """A step whose gradient is nan."""
    weights = torch.full_like(jacobian.predictions, torch.nan)
    shapes = jacobian.shapes
    return Step({n: weights.new_full(shapes[n], torch.nan) for n in jacobian.used}, weights)


@restoring
def deliver_step(
    rule: GradientRule,
    jacobian: Jacobian,
    parameters: Mapping[str, Tensor],
    scaler: torch.amp.GradScaler | None,
) -> Tensor | None:
    """Adds the gradient that a rule makes of a Jacobian to `.grad`; returns the weights."""
    found = gradient_of(rule, jacobian, scaler=scaler)
    deposit(found.own, parameters)
    deposit(found.of_rule, found.trained)
    return found.weights


def check_delivered(parameters: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are no parameters and so have no `.grad` to add to.

    Raises:
        TypeError: if there are any.
    """
    others = [name for name, p in parameters.items() if not isinstance(p, nn.Parameter)]
    if others:
        raise TypeError(
            f"J is by activations, {listed(others)}: they are no parameters, and J.backward() adds "
            f"to the .grad of parameters alone.\n"
            f"w @ J gives their gradients; J = engine.jacobian(output) is by the parameters."
        )


def deposit(gradients: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Adds gradients to the `.grad` of the parameters of these names that still require grad.

    Args:
        gradients: By name; the dict is emptied, so that nobody else holds them.
        parameters: By name.
    """
    named = [name for name in gradients if parameters[name].requires_grad]  # frozen since?
    places = [parameters[name] for name in named]
    ready = [gradients[n].to(p.device, p.dtype) for n, p in zip(named, places, strict=True)]
    gradients.clear()
    deliver(places, ready)


def owned(gradients: dict[str, Tensor]) -> list[Tensor]:
    """The gradients, each held by nobody else; the dict is emptied."""
    own = [*gradients.values()]
    gradients.clear()
    _part(own)
    return own


def _part(gradients: list[Tensor]) -> None:
    """Copies gradients that somebody else holds, or that share memory with an earlier one.

    A rule may keep what it returned, or return it (or another view of it) for two parameters.
    """
    seen: set[int] = set()
    for i in range(len(gradients)):  # by number, since a name would hold the gradient too
        memory = memory_of(gradients[i])
        if sys.getrefcount(gradients[i]) > _HELD_BY_A_LIST or memory in seen:
            gradients[i] = gradients[i].clone()
        if memory > 0:  # sparse and empty ones have none
            seen.add(memory)


def deliver(parameters: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Adds gradients to the `.grad` of parameters; their hooks run once.

    `torch.autograd.backward(parameters, gradients)` does the same but copies every gradient,
    because its caller still holds them. Here each passes through a view of its parameter. The
    view's node hands on a tensor that nobody else holds, which autograd keeps without a copy if
    there is no `.grad` yet. Gradients that it could not keep (of another layout, or held by the
    rule) are copied first, so that the original does not stay alive beside its copy.

    Args:
        parameters: Leaves that require grad.
        gradients: One for each, of its shape, dtype and device; the list is emptied.
    """
    if not parameters:
        return
    _part(gradients)
    for i, p in enumerate(parameters):
        if gradients[i].stride() != p.stride():
            gradients[i] = torch.empty_like(p).copy_(gradients[i])
    with torch.enable_grad():
        views = tuple([p.view_as(p) for p in parameters])
    given = tuple(gradients)
    gradients.clear()
    backward_into_leaves(views, given)
