"""Turns whatever a user passes as a rule into one that makes a gradient of a Jacobian."""

import importlib
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import leaf_hooks_off
from posegrad.combination._base import Combination, Rule, as_combination, outcome
from posegrad.combination._compiled import uncovered
from posegrad.errors import (
    NonFinitePredictionError,
    NotDifferentiableError,
    ShapeMismatchError,
    listed,
)
from posegrad.weighting._base import GradientRule, Jacobian, Step, weighted

__all__ = [
    "ADAPTER",
    "AnyRule",
    "OfPredictions",
    "as_gradient_rule",
    "is_noise_alone",
    "is_of_predictions",
    "is_of_torchjd",
    "rule_of_predictions",
]

AnyRule = GradientRule | nn.Module | Rule


@final
class OfPredictions(GradientRule):
    r"""A combination rule h as weights :math:`w = \partial h(\hat y) / \partial \hat y`.

    Args:
        rule: h.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = as_combination(rule)

    def weights(self, predictions: Tensor) -> Tensor:
        """The weights, in the predictions' shape.

        Raises:
            NonFinitePredictionError: if predictions are nan or infinite.
            ShapeMismatchError: if the rule gives more than one number.
            NotDifferentiableError: if its result does not depend on the predictions.
        """
        return self._differentiated(predictions)[0]

    def step(self, jacobian: Jacobian) -> Step:
        return weighted(jacobian, self.weights(jacobian.predictions))

    def trained_step(self, jacobian: Jacobian) -> tuple[Step, dict[str, Tensor]]:
        """The step, and the gradients of h by its own parameters, by name."""
        weights, total = self._differentiated(jacobian.predictions)
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        found: tuple[Tensor | None, ...] = ()
        if trained:
            with leaf_hooks_off(trained.values()):  # they run once the gradient is delivered
                found = torch.autograd.grad(total, tuple(trained.values()), allow_unused=True)
        pairs = zip(trained, found, strict=True)
        return weighted(jacobian, weights), {name: g for name, g in pairs if g is not None}

    def _differentiated(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """The weights, and the combined prediction with its graph."""
        _check_finite(predictions)
        leaf = predictions.detach().clone().requires_grad_()
        with torch.enable_grad():
            combined, _ = outcome(self.rule(leaf))
            total = combined.sum()
        if combined.numel() != 1:
            raise ShapeMismatchError(
                f"The rule combines predictions {list(leaf.shape)} to {list(combined.shape)}, but "
                f"a backward needs one number.\nReduce it in the rule, or pass the weights."
            )
        weights = None
        if total.requires_grad:
            (weights,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
        if weights is None:
            raise NotDifferentiableError(
                "The rule's result does not depend on the predictions, so it has no weights.\n"
                "Remove the detach() or no_grad() inside the rule."
            )
        return weights, total


@final
class Given(GradientRule):
    """Weights that are known."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def step(self, jacobian: Jacobian) -> Step:
        return weighted(jacobian, self.weights)


def as_gradient_rule(rule: Tensor | AnyRule) -> GradientRule:
    """Any rule as one that turns a Jacobian into a gradient.

    Args:
        rule: Weights; one of ours; TorchJD's `Weighting` or `Aggregator`; or a combination rule.

    Raises:
        TypeError: if it is none of these.
    """
    rule = uncovered(rule)
    if isinstance(rule, GradientRule):
        return rule
    if isinstance(rule, Tensor):
        return Given(rule)
    if is_of_torchjd(rule):
        adapted: GradientRule | None = importlib.import_module(ADAPTER).adapted(rule)
        if adapted is not None:
            return adapted
    return OfPredictions(rule)


def is_noise_alone(output: object, rule: Tensor | AnyRule) -> bool:
    """Whether an output has no rows and the rule has noise, which then is the whole step."""
    if not isinstance(output, Tensor) or output.ndim != 1 or output.numel():
        return False
    return as_gradient_rule(rule).has_noise


def rule_of_predictions(rule: Rule) -> Combination:
    """A rule for `combine`, which has predictions but no Jacobian.

    Raises:
        TypeError: if the rule looks at gradients, or is no rule.
    """
    rule = uncovered(rule)
    if _looks_at_gradients(rule):
        raise TypeError(
            f"{type(rule).__name__} looks at gradients, and combine() gives a rule nothing but "
            f"predictions.\n"
            f"Use engine.gather(poses).backward(rule), or engine.backward(output, rule)."
        )
    return as_combination(rule)


def is_of_predictions(rule: object) -> bool:
    """Whether a rule looks at predictions alone: neither weights nor a rule on gradients."""
    rule = uncovered(rule)
    return not isinstance(rule, Tensor) and not _looks_at_gradients(rule)


def _looks_at_gradients(rule: object) -> bool:
    if isinstance(rule, GradientRule):
        return True
    return is_of_torchjd(rule) and importlib.import_module(ADAPTER).looks_at_gradients(rule)


ADAPTER = "posegrad.interop.torchjd"


def _check_finite(predictions: Tensor) -> None:
    if bool(predictions.isfinite().all()):
        return
    rows = (~predictions.isfinite()).reshape(-1).nonzero().flatten().tolist()
    raise NonFinitePredictionError(
        f"{len(rows)} of {predictions.numel()} predictions are not finite: numbers "
        f"{listed(rows)}.\n"
        f"A combination of them would be nan and so would every gradient; no .grad was touched.\n"
        f"Leave those poses out of the output, or pass the weights."
    )


def is_of_torchjd(rule: object) -> bool:
    """Whether the rule's class, or one of its bases, is TorchJD's (which then is installed)."""
    return any(kind.__module__.partition(".")[0] == "torchjd" for kind in type(rule).__mro__)
