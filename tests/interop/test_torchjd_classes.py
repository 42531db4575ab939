"""Classes of one's own made of TorchJD's, hooks, what is refused, and life without it."""

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation as theirs
from torchjd import scalarization
from torchjd.linalg import Matrix, PSDMatrix

from posegrad import (
    Clip,
    Engine,
    Mean,
    Median,
    Min,
    MissingExtraError,
    NonFiniteGradientError,
    ShapeMismatchError,
    SignAgreement,
    TrimmedMean,
    UnsupportedModuleError,
)
from posegrad.interop.torchjd import adapted
from tests import reference
from tests.device import DEVICE
from tests.interop.torchjd_table import (
    REFUSED,
    RULES,
    M,
    Rule,
    close,
    gradient_of,
    losses_of,
    model_in,
    of_autojac,
    step_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy


COUNTING = ["Mean", "Sum", "Random", "Constant", "CRMOGM of Mean"]

# Whatever one makes of TorchJD's classes.


class OfGramian(theirs.Weighting[PSDMatrix]):
    def forward(self, gramian: Tensor, /) -> Tensor:
        assert gramian.shape[0] == gramian.shape[1]
        return gramian.sum(1).sin()


class OfMatrix(theirs.Weighting[Matrix]):
    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.abs().amax(1)


class Derived(OfGramian):
    pass


class Halved(theirs.UPGrad):
    """An aggregator that does more than its weighting."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return super().forward(matrix) / 2


class Capped(theirs.TrimmedMean):
    """Knows all columns, where its base knows one."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        found = super().forward(matrix)
        return found / found.norm().clamp(min=1e-3)


class Weighed(theirs.MeanWeighting):
    """Reads the matrix, where its base counts rows."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.abs().amax(1)


class Own(theirs.Aggregator):
    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.mean(0) * matrix.norm()


OWN: dict[str, Rule] = {
    "of the Gramian": Rule(OfGramian, reads="gramian"),
    "of the matrix": Rule(OfMatrix),
    "derived": Rule(Derived, reads="gramian"),
    "an aggregator of it": Rule(lambda: theirs.GramianWeightedAggregator(OfGramian())),
    "an aggregator of the matrix": Rule(lambda: theirs.WeightedAggregator(OfMatrix())),
    "CRMOGM of it": Rule(lambda: theirs.CRMOGMWeighting(OfGramian()), reads="gramian"),
    "CRMOGM of the matrix": Rule(lambda: theirs.CRMOGMWeighting(OfMatrix())),
    "a derived aggregator": Rule(Halved, weights=False),
    "a derived rule on columns": Rule(lambda: Capped(1), weights=False),
    "a derived rule on counts": Rule(Weighed),
    "an aggregator of one's own": Rule(Own, weights=False),
    "a hook on the aggregator": Rule(lambda: _hooked(theirs.UPGrad()), weights=False),
    "a hook on its weighting": Rule(lambda: _hooked_inside(theirs.UPGrad())),
    "a hook on a rule on columns": Rule(lambda: _hooked(theirs.TrimmedMean(1)), weights=False),
    "a hook that reads the matrix": Rule(lambda: _reading(theirs.MeanWeighting())),
    "a hook around the Gramian": Rule(
        lambda: _reading(theirs.UPGrad(), "weighting"), weights=False
    ),
}


def _hooked(rule: Any) -> Any:
    rule.register_forward_hook(lambda module, arguments, result: 3 * result)
    return rule


def _hooked_inside(rule: Any) -> Any:
    _hooked(rule.gramian_weighting)
    return rule


def _reading(rule: Any, inside: str = "") -> Any:
    """Multiplies weights with the number of columns."""
    module = getattr(rule, inside) if inside else rule
    module.register_forward_hook(lambda module, arguments, w: arguments[0].shape[1] * w)
    return rule


@pytest.mark.parametrize("name", OWN)
def test_classes_of_ones_own_and_hooks(name: str) -> None:
    row = OWN[name]
    model, J = step_of(torch.float64, 0)
    expected, expected_weights, size = of_autojac(row, row.new(), model)
    weights = J.to(DEVICE).backward(row.new())
    close(gradient_of(model), expected, 1e-9 * size)
    assert (weights is not None) == row.weights
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def test_the_users_weighting_keeps_no_hook_of_ours() -> None:
    rule = theirs.MGDAWeighting() << (lambda matrix: matrix @ matrix.mT)
    model = model_in(torch.float64)
    Engine(model).backward(losses_of(model, 0), rule)
    assert not any(part._forward_pre_hooks for part in rule.modules())
    copy.deepcopy(rule)


def test_weights_are_no_part_of_a_rules_state() -> None:
    model, rule = model_in(torch.float32), theirs.Constant(torch.ones(M))
    weights = Engine(model).backward(losses_of(model, 0), rule)
    assert weights is not None
    weights.zero_()
    assert rule.weighting.weights.tolist() == [1.0] * M


def test_a_scalarization_is_a_rule_of_predictions() -> None:
    model, expected = model_in(torch.float64), model_in(torch.float64)
    losses = losses_of(expected, 0)
    for rule in (scalarization.Mean(), scalarization.GeometricMean()):
        losses = losses_of(expected, 0)
        rule(losses).backward()
        Engine(model).backward(losses_of(model, 0), rule)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    engine = Engine(nn.Linear(3, 1))
    assert engine.combine(torch.ones(4, 3), scalarization.Mean()).prediction.shape == ()


# What cannot be served.


class Silent(theirs.Weighting):  # type: ignore[type-arg]
    """Does not say what it reads."""

    def forward(self, stat: Tensor, /) -> Tensor:
        return stat.sum(1)


class TooMany(theirs.Aggregator):
    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix


TWO = r"wants the product of the Jacobians of two independent batches.*\nPass the losses of both"
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{name: (getattr(theirs, name), UnsupportedModuleError, f"{name} {TWO}") for name in REFUSED},
    "CRMOGM of MoDo": (
        lambda: theirs.CRMOGMWeighting(theirs.MoDoWeighting()),
        UnsupportedModuleError,
        f"MoDoWeighting {TWO}",
    ),
    "an aggregator of MoDo": (
        lambda: theirs.WeightedAggregator(theirs.MoDoWeighting()),
        UnsupportedModuleError,
        f"MoDoWeighting {TWO}",
    ),
    "a hooked aggregator of SDMGrad": (
        lambda: _hooked(theirs.GramianWeightedAggregator(theirs.SDMGradWeighting())),
        UnsupportedModuleError,
        f"SDMGradWeighting {TWO}",
    ),
    "a weighting that does not say what it reads": (
        Silent,
        UnsupportedModuleError,
        r"Silent does not say .*\nWrite class Silent\(Weighting\[PSDMatrix\]\) if",
    ),
    "a composition that makes no Gramian": (
        lambda: theirs.IMTLGWeighting() << (lambda matrix: matrix / matrix.norm()),
        ShapeMismatchError,
        r"In IMTLGWeighting << f, f made \[6, 82\] of the matrix .*\nf is given the matrix",
    ),
    "a wrong number of tasks": (
        lambda: theirs.Constant(torch.ones(3)),
        ValueError,
        "Parameter `.*` should have 3 rows",
    ),
    "an aggregator of wrong shape": (
        TooMany,
        ShapeMismatchError,
        r"TooMany made \[6, 82\] of a matrix \[6, 82\].\nReturn one number for each column, \[82\]",
    ),
    "a weighting of wrong shape": (
        lambda: theirs.MGDAWeighting() << (lambda matrix: torch.eye(2)),
        ShapeMismatchError,
        r"_Composition gave weights of shape \[2\] for 6 rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_served_is_refused_by_name(name: str) -> None:
    make, error, match = BAD[name]
    model = model_in(torch.float32)
    J = Engine(model).jacobian(losses_of(model, 0))
    with pytest.raises(error, match=r"(?s)" + match):
        J.backward(make())
    assert all(p.grad is None for p in model.parameters())


OF_TWO: dict[str, Callable[[], Any]] = {
    "MoDo": lambda: theirs.MoDoWeighting(gamma=0.3),
    "SDMGrad": theirs.SDMGradWeighting,
    "CRMOGM of MoDo": lambda: theirs.CRMOGMWeighting(theirs.MoDoWeighting()),
}


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("name", OF_TWO)
def test_rules_of_two_batches_agree_with_torchjd_on_matrices(name: str, batches: int) -> None:
    model = model_in(torch.float64)
    engine, rule, twin = Engine(model), OF_TWO[name](), OF_TWO[name]()
    parameters = reference.trainable(model)
    for step in range(3):  # they have a state
        seeds = range(10 * step, 10 * step + batches)
        first, second, *third = (
            reference.rows(losses_of(model, seed), parameters) for seed in seeds
        )
        model.zero_grad()

        found = engine.backward(tuple(losses_of(model, seed) for seed in seeds), rule)

        weights = twin(first @ second.T)
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)
        rows = third[0] if third else (first + second) / 2
        torch.testing.assert_close(gradient_of(model), weights @ rows, rtol=1e-9, atol=1e-9)


def test_batches_that_do_not_fit_are_refused() -> None:
    model = model_in(torch.float64)
    engine, one = Engine(model), losses_of(model, 0)
    with pytest.raises(TypeError, match=r"(?s)UPGradWeighting is a rule of one batch, but 2"):
        engine.backward((one, losses_of(model, 1)), theirs.UPGradWeighting())
    for wrong in ((one,), (one, one[:2]), (one.sum(), one.sum())):
        with pytest.raises(ShapeMismatchError, match="row i of each must be the same task's"):
            engine.backward(wrong, theirs.MoDoWeighting())
    scales = torch.ones(M, dtype=torch.float64)
    scales[1] = float("nan")
    rule = theirs.MoDoWeighting()
    with pytest.raises(NonFiniteGradientError, match="not finite"):
        engine.backward((losses_of(model, 0), losses_of(model, 1) * scales), rule)
    assert all(p.grad is None for p in model.parameters())
    assert rule._lambda is None


BY_COLUMN = ["GradDrop", "GradDrop, leak", "TrimmedMean"]
LOOKING = [n for n in RULES if n.removesuffix("Weighting") not in (*COUNTING, *BY_COLUMN)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    model, scales = model_in(torch.float32), torch.ones(M)
    scales[2] = value
    J = Engine(model).jacobian(losses_of(model, 0) * scales)
    for name in LOOKING:
        with pytest.raises(NonFiniteGradientError, match=r"1 of 6 rows, .*: rows 2"):
            J.backward(RULES[name].new(torch.float32))
        assert all(p.grad is None for p in model.parameters()), name
    assert len(LOOKING) > 30


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TorchJD were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchjd"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "posegrad.interop.torchjd")


@pytest.mark.usefixtures("alone")
def test_without_torchjd_the_pip_line_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"Run: pip install 'posegrad\[torchjd\]'"):
        importlib.import_module("posegrad.interop.torchjd")


@pytest.mark.usefixtures("alone")
def test_everything_else_works_without_torchjd() -> None:
    model, poses = nn.Linear(3, 1), torch.randn(5, 3)
    engine = Engine(model)
    for rule in (Clip(1.0), Median(), TrimmedMean(1), SignAgreement(0.5), Min(), torch.ones(5)):
        engine.backward(model(poses).squeeze(1), rule)
    for rule in (Mean(), lambda predictions: predictions.mean(0)):
        engine.combine(poses, rule).prediction.backward()
    with pytest.raises(TypeError, match="Clip looks at gradients"):
        engine.combine(poses, Clip(1.0))


def test_rules_of_ours_are_none_of_theirs() -> None:
    for rule in (Clip(1.0), Median(), Min(), scalarization.Mean()):
        assert adapted(rule) is None


class WithMomentum(theirs.Aggregator):
    """Returns its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | float = 0.0

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.state = 0.5 * self.state + matrix.mean(0)
        return self.state


def test_what_is_done_to_grad_does_not_reach_the_state_of_a_rule() -> None:
    model, x, rule = (
        nn.Linear(3, 1).double(),
        torch.randn(4, 3, dtype=torch.float64),
        WithMomentum(),
    )
    mean = torch.cat([x.mean(0), torch.ones(1, dtype=torch.float64)])  # of a linear model's rows
    for total in (1.0, 1.5, 1.75):
        Engine(model).backward(model(x).squeeze(1), rule)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(found, total * mean)
        model.zero_grad(set_to_none=False)  # writes zeros
        model.zero_grad()
