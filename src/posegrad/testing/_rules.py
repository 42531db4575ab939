"""The laws of a combination rule, as one function its author calls."""

import copy
import pickle
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from posegrad.combination import Combination, OnlineForm
from posegrad.combination._base import Rule, as_combination, outcome
from posegrad.testing._seeded import seeded

__all__ = ["assert_combination"]


def assert_combination(
    rule: Rule,
    predictions: Tensor | None = None,
    *,
    components: tuple[int, ...] = (),
    shift_equivariant: bool = True,
) -> None:
    r"""Asserts the laws of a combination rule.

    One prediction is its own combination. The order of the poses does not matter. Equal calls give
    equal numbers. The gradient is finite and is the derivative (checked against differences).
    Adding a constant to every prediction adds it to the result. Copies and pickles behave alike.
    If the rule has an online form: chunk by chunk, in any order, its features and coefficients give
    the weights, and its transfer matrix re-bases the features.

    Args:
        rule: The rule, or any function from predictions `[m, ...]` to `[...]`.
        predictions: `[m, ...]` to check the laws on, no two equal. Default: twelve draws of 1 to 16
            poses, spread over 0.5 to 50 units.
        components: The trailing shape of a prediction for the default draws; `(d,)` for rules that
            pool vectors.
        shift_equivariant: False for rules like `Sum` that have no such law.

    Raises:
        AssertionError: naming the law that does not hold, with the numbers.

    Example:
        >>> assert_combination(Boltzmann(kT=0.593))
        >>> assert_combination(lambda predictions: predictions.mean(0))
    """
    rule = as_combination(rule)
    draws = [predictions] if predictions is not None else _draws(components)
    rule = copy.deepcopy(rule).double()
    for draw in draws:
        values = draw.detach().double()
        _single_pose_is_identity(rule, values)
        _order_does_not_matter(rule, values)
        _repeats_and_copies_agree(rule, values)
        _gradient_is_the_derivative(rule, values)
        if shift_equivariant:
            _shifts_with_the_predictions(rule, values)
        form = rule.online()
        if form is not None:
            _online_form_gives_the_weights(rule, form, values)
            _transfer_rebases_the_features(form, values)


def _draws(components: tuple[int, ...]) -> Iterator[Tensor]:
    generator = seeded(20)
    for m in (1, 2, 3, 5, 8, 16):
        for spread in (0.5, 50.0):
            noise = torch.rand(m, *components, generator=generator, dtype=torch.float64)
            yield spread * (noise - 0.7)


def _close(found: Tensor, expected: Tensor, law: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{law}: {text}"
    )


def _prediction(rule: Combination, values: Tensor) -> Tensor:
    """The combined prediction, without what the rule returns beside it."""
    return outcome(rule(values))[0]


def _single_pose_is_identity(rule: Combination, values: Tensor) -> None:
    _close(_prediction(rule, values[:1]), values[0], "one prediction is its own combination")


def _order_does_not_matter(rule: Combination, values: Tensor) -> None:
    _close(
        _prediction(rule, values.flip(0)),
        _prediction(rule, values),
        "the order of the poses does not matter",
    )
    weights = rule.weights(values.flip(0)).flip(0)
    _close(weights, rule.weights(values), "the order of the poses does not matter to the weights")


def _repeats_and_copies_agree(rule: Combination, values: Tensor) -> None:
    expected = _prediction(rule, values)
    assert torch.equal(_prediction(rule, values), expected), "equal calls give equal numbers"
    assert torch.equal(_prediction(copy.deepcopy(rule), values), expected), (
        "a copy of the rule behaves alike"
    )
    try:
        revived = pickle.loads(pickle.dumps(rule))
    except (AttributeError, pickle.PicklingError):
        return  # a lambda, or a class defined inside a function: Python cannot pickle those
    assert torch.equal(_prediction(revived, values), expected), "a pickled rule behaves alike"


def _gradient_is_the_derivative(rule: Combination, values: Tensor) -> None:
    weights = rule.weights(values)
    assert weights.shape == values.shape, "there is one weight for each prediction"
    assert bool(weights.isfinite().all()), f"weights are finite: {weights}"
    leaf = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        partial(_prediction, rule), leaf, eps=1e-7, atol=1e-4, rtol=1e-3
    )


def _shifts_with_the_predictions(rule: Combination, values: Tensor) -> None:
    _close(
        _prediction(rule, values + 3.25),
        _prediction(rule, values) + 3.25,
        "adding a constant to all adds it to the result",
    )


def _online_form_gives_the_weights(rule: Combination, form: OnlineForm, values: Tensor) -> None:
    expected = rule.weights(values)
    level = form.level(values)
    features = form.features(values, level)  # [K, m, ...]
    found = (form.coefficients(values, level) * features).sum(dim=0)
    _close(found, expected, "the online form gives the rule's weights")
    chunks = [form.level(values[i : i + 2]) for i in range(0, len(values), 2)]
    joined = torch.stack(chunks).amax(dim=0)
    assert torch.equal(joined, level), "levels of chunks join by their maximum"


def _transfer_rebases_the_features(form: OnlineForm, values: Tensor) -> None:
    level = form.level(values)
    rise = torch.full_like(level, 0.75)
    transfer = form.transfer(rise)  # [K, K, ...]
    upper = [transfer[k, j] for k in range(form.count) for j in range(k + 1, form.count)]
    assert not any(bool(entry.any()) for entry in upper), "the transfer matrix is lower triangular"
    before = form.features(values, level)  # [K, m, ...]
    moved = (transfer[:, :, None] * before[None]).sum(dim=1)
    _close(moved, form.features(values, level + rise), "transfer re-bases the features")
