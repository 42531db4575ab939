"""The laws of rules that look at gradients, on drawn rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchjd.aggregation import DualProjWeighting
from torchjd.linalg import QuadprogProjector

from posegrad import (
    Aggregation,
    Boltzmann,
    Clip,
    Engine,
    Median,
    Projected,
    ShapeMismatchError,
    SignAgreement,
    TrimmedMean,
    Weighting,
)
from posegrad.testing import assert_aggregation, assert_weighting, peak_live_bytes, table
from tests.weighting.table import RULES

WEIGHTINGS = [name for name, row in RULES.items() if row.weights]
AGGREGATIONS = [name for name, row in RULES.items() if not row.weights]


# A rule of the library gets these tests by its line in the kit's table.
KIT = {name: row for name, row in table.RULES.items() if row.kind != "predictions"}


@pytest.mark.parametrize("name", {**RULES, **KIT})
def test_every_rule_keeps_the_laws_of_its_kind(name: str) -> None:
    row = {**RULES, **KIT}[name]
    rule = row.make()
    check = assert_weighting if isinstance(rule, Weighting) else assert_aggregation
    check(rule, least=row.least)


@pytest.mark.parametrize("name", KIT)
def test_every_rule_steps_and_says_what_it_weighed(name: str) -> None:
    """From a batch and chunk by chunk alike; `.grad` is the rule's own result on plain rows."""
    rule, model, poses = KIT[name].make(), nn.Linear(3, 1).double(), torch.randn(7, 3).double()
    engine = Engine(model, chunk_size=3)
    weights = engine.backward(model(poses).squeeze(1), rule)
    found = [p.grad.clone() for p in model.parameters()]
    assert (weights is None) == isinstance(rule, Aggregation)
    rows = torch.cat([poses, torch.ones(7, 1).double()], dim=1)  # of a linear model: weight, bias
    if isinstance(rule, Aggregation):
        expected = rule(rows)
    else:
        expected = rule(rows @ rows.mT, model(poses).detach().squeeze(1)) @ rows
    torch.testing.assert_close(torch.cat([g.flatten() for g in found]), expected)

    model.zero_grad()
    engine.gather(poses).backward(rule)
    for p, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@st.composite
def matrices(draw: st.DrawFn, *, least: int = 1) -> Tensor:
    """Rows `[M, n]` in float64, of whole numbers or not: with ties and zeros, or without."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.integers(least, 12)), draw(st.integers(1, 6))
    values = draw(st.sampled_from([1.0, 1e-8, 1e8])) * torch.randn(shape, dtype=torch.float64)
    return values.round() if draw(st.booleans()) else values


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(data=st.data())
def test_every_aggregation_is_its_formula(name: str, data: st.DataObject) -> None:
    row = RULES[name]
    rows = data.draw(matrices(least=row.least))
    expected = row.formula(rows, torch.zeros(len(rows)))
    scale = float(rows.abs().max())
    torch.testing.assert_close(row.make()(rows), expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", WEIGHTINGS)
@given(data=st.data())
def test_every_weighting_is_its_formula(name: str, data: st.DataObject) -> None:
    row = RULES[name]
    rows = data.draw(matrices(least=row.least))
    rows = torch.where(rows.abs().sum(1, keepdim=True) > 0, rows, 1.0)  # 0 / 0 in the formula
    y = torch.randn(len(rows), dtype=torch.float64)
    weights = row.make()(rows @ rows.mT, y)
    size = float((weights.abs() * rows.norm(dim=1)).sum())
    torch.testing.assert_close(weights @ rows, row.formula(rows, y), rtol=0, atol=1e-10 * size)


@given(rows=matrices())
def test_clipped_gradients_are_no_longer_than_the_greatest_norm(rows: Tensor) -> None:
    weights = Clip(0.5)(rows @ rows.mT, rows[:, 0])
    lengths = (weights[:, None] * rows).norm(dim=1)
    assert bool((lengths <= 0.5 * (1 + 1e-12)).all())
    assert torch.equal(weights == 1, rows.norm(dim=1) <= 0.5)


@given(rows=matrices(), kT=st.sampled_from([0.2, 1.0, 30.0]))
def test_a_projected_gradient_is_the_nearest_that_agrees_with_every_pose(
    rows: Tensor, kT: float
) -> None:
    rows = rows / rows.abs().max().clamp(min=1e-30)
    y = torch.randn(len(rows), dtype=torch.float64)
    exact = QuadprogProjector(norm_eps=1e-30, reg_eps=1e-10)
    rule = Projected(
        Boltzmann(kT),
        lambda pref_vector: DualProjWeighting(pref_vector=pref_vector, projector=exact),
    )
    preferred = Boltzmann(kT).weights(y)

    weights = rule(rows @ rows.mT, y)

    # Karush, Kuhn and Tucker: x agrees with every pose, and is pushed only by those it just grazes.
    x, push, near = weights @ rows, weights - preferred, 1e-4 * float(weights.abs().sum())
    assert bool((rows @ x >= -near).all())
    assert bool((push >= -1e-9 * weights.abs().sum()).all())
    assert float((push * (rows @ x)).abs().max()) <= near * float(weights.abs().sum())


@given(rows=matrices(), other=st.floats(-1e6, 1e6))
def test_one_wild_pose_moves_a_robust_rule_no_further_than_the_others_reach(
    rows: Tensor, other: float
) -> None:
    m = len(rows)
    mixed = torch.cat([rows, torch.full_like(rows[:1], other)])
    for rule in (TrimmedMean(1), Median()):
        if m >= 2:  # an outlier among two is no outlier
            found = rule(mixed)
            assert bool((rows.amin(0) - 1e-6 <= found).all())
            assert bool((found <= rows.amax(0) + 1e-6).all())


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_column_is_the_same_among_few_and_among_many(name: str) -> None:
    """Of a block so wide that it is taken in pieces."""
    block = torch.randn(6, 3, 130_000)
    block[2, 1, 1] = block[3, 2, -1] = math.nan
    found = RULES[name].make()(block)
    for some in (slice(0, 5), slice(44_730, 44_750), slice(-5, None)):  # 6 x 174_762 is a piece
        expected = RULES[name].make()(block[..., some])
        torch.testing.assert_close(found[..., some], expected, equal_nan=True)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_only_columns_with_a_nan_are_nan(name: str) -> None:
    block = torch.randn(7, 4, 3)
    block[0, 1, 2] = block[6, 3, 0] = math.nan
    found = RULES[name].make()(block)
    assert found.isnan().nonzero().tolist() == [[1, 2], [3, 0]]


def test_infinity_is_a_number_larger_than_any() -> None:
    block = torch.tensor([[math.inf, 1.0], [2.0, -math.inf], [1.0, 5.0], [0.0, 3.0]])
    torch.testing.assert_close(TrimmedMean(1)(block), torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(Median()(block), torch.tensor([1.5, 2.0]))
    assert SignAgreement(0.0)(block).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [301, 2051])
def test_signs_are_counted_exactly_in_half_precision(dtype: torch.dtype, count: int) -> None:
    alike = torch.ones(count, 1, dtype=dtype)
    assert SignAgreement(1.0)(alike) == 1
    alike[0] = -1
    assert SignAgreement(1.0)(alike) == 0
    assert SignAgreement((count - 2) / count)(alike) > 0


def test_an_empty_parameter_has_an_empty_gradient() -> None:
    for name in AGGREGATIONS:
        assert RULES[name].make()(torch.ones(5, 0, 3)).shape == (0, 3)


def _tower(m: int) -> tuple[nn.Module, Tensor]:
    """Many layers of one size, and their batch."""
    layers = [layer for _ in range(24) for layer in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 1), nn.Flatten(0)), torch.randn(m, 32)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_aggregation_holds_a_few_blocks_and_no_matrix(name: str) -> None:
    model, batch = _tower(16)
    J = Engine(model).jacobian(model(batch))
    block = 16 * 32 * 33 * 4
    with peak_live_bytes() as peak:
        J.backward(RULES[name].make())
    gradients = sum(p.numel() for p in model.parameters()) * 4
    assert peak.bytes <= gradients + 6 * block
    assert peak.bytes < J.matrix().nbytes / 2


def test_torchjds_rule_on_the_matrix_holds_the_matrix() -> None:
    from torchjd.aggregation import TrimmedMean as OnTheMatrix

    model, batch = _tower(16)
    J = Engine(model).jacobian(model(batch))
    with peak_live_bytes() as peak:
        OnTheMatrix(1)(J.matrix())
    assert peak.bytes > J.matrix().nbytes / 2


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold is .*, but it must lie in \[0, 1\]"):
        SignAgreement(threshold)


@pytest.mark.parametrize("trim", [0, -1, 1.5, True])
def test_trim_is_a_whole_number(trim: int) -> None:
    with pytest.raises(ValueError, match=r"trim is .*, but it must be a whole number"):
        TrimmedMean(trim)


def test_nothing_is_left_of_too_few_rows() -> None:
    with pytest.raises(ShapeMismatchError, match=r"leaves out 4 rows, and there are 4.\nTrim at"):
        TrimmedMean(2)(torch.ones(4, 3))


def test_a_weighting_that_is_made_already_cannot_be_given_a_preference() -> None:
    with pytest.raises(TypeError, match=r"Pass the class, or functools.partial"):
        Projected(Median, DualProjWeighting())


@pytest.mark.parametrize("name", RULES)
def test_a_rule_prints_its_options(name: str) -> None:
    option = {"Clip": "max_norm=", "TrimmedMean": "trim=", "SignAgreement": "threshold="}
    kind = type(RULES[name].make()).__name__
    assert option.get(kind, kind) in repr(RULES[name].make())
