"""The laws of the rules (law 4 of the design), on drawn values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Best, Boltzmann, Combination, Max, Mean, Min, Sum, TopK
from posegrad.testing import assert_combination, predictions, rules
from posegrad.testing.table import RULES as TABLE

# A rule of the library gets the tests of this file and of tests/schedule by its line in the table.
COMBINATIONS = {name: row for name, row in TABLE.items() if row.kind == "predictions"}
RULES: dict[str, Combination] = {
    name: row.make() for name, row in TABLE.items() if row.takes_any_predictions
}
ANY_SHAPE = [(), (3,), (2, 2)]
CASES = [
    (n, c)
    for n, row in COMBINATIONS.items()
    for c in ([row.components] if row.components else ANY_SHAPE)
]


@pytest.mark.parametrize(("name", "components"), CASES)
def test_every_rule_keeps_the_laws(name: str, components: tuple[int, ...]) -> None:
    row = COMBINATIONS[name]
    assert_combination(row.make(), components=components, shift_equivariant=row.shifts)


@pytest.mark.parametrize(
    ("rule", "shifts"),
    [(Max(torch.tensor(5.0)), True), (Boltzmann(30.0), True), (Best(largest=True), True)],
)
def test_other_arguments_keep_the_laws(rule: Combination, shifts: bool) -> None:
    assert_combination(rule, shift_equivariant=shifts)


@given(rules(), predictions(components=(2,)))
def test_every_rule_keeps_the_laws_on_drawn_values(rule: Combination, values: Tensor) -> None:
    assert_combination(rule, values, shift_equivariant=not isinstance(rule, Sum))


@given(predictions(), st.sampled_from([0.1, 1.0, 1.7, 50.0, 1000.0]))
def test_smooth_extrema_bound_the_true_ones(values: Tensor, scale: float) -> None:
    low, mean, high = values.min(), values.mean(), values.max()
    slack = math.log(len(values)) / scale
    rounding = 1e-12 * (1 + float(values.abs().max()))

    smooth_low, smooth_high = Min(scale)(values), Max(scale)(values)

    assert smooth_low <= low <= mean + rounding
    assert mean - rounding <= high <= smooth_high
    assert smooth_high - high <= slack + rounding
    assert low - smooth_low <= slack + rounding


@given(predictions(), st.sampled_from([0.1, 1.7, 1000.0]))
def test_weights_of_logsumexp_are_a_distribution(values: Tensor, scale: float) -> None:
    for rule in (Min(scale), Max(scale)):
        weights = rule.weights(values)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(), torch.ones((), dtype=values.dtype))


@given(predictions(), st.sampled_from([0.1, 0.593, 30.0]))
def test_weights_of_boltzmann_sum_to_one(values: Tensor, kT: float) -> None:
    weights = Boltzmann(kT).weights(values)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=values.dtype))


def test_weights_of_boltzmann_may_be_negative() -> None:
    # A pose 2 kT above the average population gains less than it costs: raising it lowers the mean.
    weights = Boltzmann(1.0).weights(torch.tensor([0.0, 4.0]))
    assert weights[1] < 0 < weights[0]


def test_boltzmann_runs_from_best_to_mean() -> None:
    values = torch.tensor([-9.0, -8.0, -4.0])
    torch.testing.assert_close(Boltzmann(1e-3)(values), Best()(values))
    torch.testing.assert_close(Boltzmann(1e6)(values), Mean()(values))


def test_weights_are_exact_zeros_and_never_denormal() -> None:
    # At scale 1000, 0.09 kT above the best is e^-90 = 8e-40: below float32's normal numbers.
    weights = Min(1000.0).weights(torch.tensor([-9.0, -8.91, -8.8, -4.0]))
    assert weights.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_extremum_is_subtracted_before_scaling() -> None:
    # Scaled first, 88 * 1000 is rounded to multiples of 1/128 and the weights are off by 0.8 %.
    values = torch.tensor([88.0007, 88.0000, 87.9993], dtype=torch.float32)
    exact = torch.softmax(1000 * values.double(), dim=0)
    torch.testing.assert_close(Max(1000.0).weights(values).double(), exact, rtol=1e-4, atol=0)


def test_ties_share_the_weight_of_the_best() -> None:
    assert Best().weights(torch.tensor([1.0, 0.0, 0.0])).tolist() == [0.0, 0.5, 0.5]


def test_topk_averages_a_group_smaller_than_k() -> None:
    assert TopK(5)(torch.tensor([1.0, 3.0])) == 2.0


def test_scale_may_be_trained() -> None:
    rule = Min(nn.Parameter(torch.tensor(2.0)))
    rule(torch.tensor([-9.0, -8.0])).backward()

    # d/dt [-log(e^{9t} + e^{8t}) / t] at t = 2, by hand: log1p(e^-2)/4 + e^-2 / (2 (1 + e^-2)).
    e = math.exp(-2)
    expected = math.log1p(e) / 4 + e / (2 * (1 + e))
    torch.testing.assert_close(rule.scale.grad, torch.tensor(expected))
    assert rule.online() is None


def test_scale_may_be_annealed() -> None:
    rule = Max(torch.tensor(1.0))
    before = rule(torch.tensor([0.0, 1.0]))
    rule.scale.mul_(100)
    assert rule(torch.tensor([0.0, 1.0])) < before
    assert "scale" in rule.state_dict()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, torch.tensor(-2.0)])
def test_scales_must_be_positive_and_finite(value: float | Tensor) -> None:
    for make in (Min, Max, Boltzmann):
        with pytest.raises(ValueError, match=r"must be positive and finite"):
            make(value)


def test_scales_must_be_one_number() -> None:
    with pytest.raises(ValueError, match=r"scale has shape \[2\], but it is one number"):
        Min(torch.ones(2))


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_must_be_a_whole_number(k: int) -> None:
    with pytest.raises(ValueError, match=r"k is .*, but it must be a whole number"):
        TopK(k)
