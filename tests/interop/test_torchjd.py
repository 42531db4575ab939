"""TorchJD's rules, as they are, against `torchjd.autojac` and plain rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import Stateful
from torchjd import aggregation as theirs

from posegrad import Engine, PoseJacobian
from posegrad.testing import peak_live_bytes
from tests import reference
from tests.architectures import ARCHITECTURES
from tests.architectures.row import draw
from tests.device import DEVICE
from tests.interop.torchjd_table import (
    ON_CPU_ONLY,
    REFUSED,
    RULES,
    M,
    by_hand,
    close,
    gradient_of,
    losses_of,
    model_in,
    of_autojac,
    size_of,
    step_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy

BASES = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def test_the_table_has_every_rule_of_torchjd() -> None:
    kinds = theirs.Aggregator, theirs.Weighting
    public = {
        name
        for name, kind in vars(theirs).items()
        if inspect.isclass(kind) and issubclass(kind, kinds)
    }
    assert public - BASES == {name for name in (*RULES, *ON_CPU_ONLY) if hasattr(theirs, name)} | {
        *REFUSED
    }
    assert public <= {*theirs.__all__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_torchjd(name: str, dtype: torch.dtype) -> None:
    row, tolerance = RULES[name], TOLERANCE[dtype]
    ours, its = row.new(dtype), row.new(dtype)
    for step in range(4):
        if step == 2 and isinstance(ours, Stateful):
            ours.reset()
            its.reset()
        model, J = step_of(dtype, step)
        torch.manual_seed(step)
        expected, expected_weights, size = of_autojac(row, its, model)

        torch.manual_seed(step)
        weights = J.to(DEVICE).backward(ours)

        close(gradient_of(model), expected, tolerance * size)
        assert (weights is not None) == row.weights
        if weights is not None:
            close(weights, expected_weights, tolerance * max(1, float(weights.abs().max())))


STATEFUL = [name for name, row in RULES.items() if isinstance(row.new(), Stateful)]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_rule_with_a_state_goes_on_from_it(name: str) -> None:
    model, rule = model_in(torch.float64), RULES[name].new()
    engine = Engine(model)

    def step(rule: Any, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        engine.backward(losses_of(model, seed), rule)
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    fresh = step(rule, 1)
    step(rule, 2)
    later = step(rule, 1)
    assert not all(map(torch.equal, fresh, later)) or name == "CRMOGM of Mean"
    rule.reset()
    for again, first in zip(step(rule, 1), fresh, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=0)


@dataclass
class Case:
    """A Jacobian, and its rows by plain autograd."""

    model: nn.Module
    jacobian: PoseJacobian
    rows: Tensor
    used: list[str]


def _gathered() -> tuple[nn.Module, Tensor, PoseJacobian]:
    model, poses, targets = model_in(torch.float64), draw(0, M, 7), draw(100, M, 2)
    J = Engine(model, chunk_size=2).gather(
        poses, loss=lambda y, i: (y - targets[i]).square().sum(1)
    )
    return model, losses_of(model, 0), J


def _read(architecture: str, *shape: int) -> tuple[nn.Module, Tensor, PoseJacobian]:
    row = ARCHITECTURES[architecture]
    model = row.build()
    outputs = [row.output(model, 0) for _ in range(2)]
    plain, ours = (y.reshape(shape or y.shape) for y in outputs)
    return model, plain, Engine(model).jacobian(ours)


# name: a model, an output of M numbers, its Jacobian
OUTPUTS: dict[str, Callable[[], tuple[nn.Module, Tensor, PoseJacobian]]] = {
    "ragged": lambda: _read("Message passing"),
    "[3, 2]": lambda: _read("MLP", 3, 2),
    "tied": lambda: _read("Tied, chained"),
    "an unused parameter": lambda: _read("Unused and frozen"),
    "gathered": _gathered,
}


@cache
def _case(output: str) -> Case:
    model, plain, J = OUTPUTS[output]()
    parameters = reference.trainable(model)
    left = reference.deposited(plain, torch.ones_like(plain), parameters)
    used = [name for name, gradient in left.items() if gradient is not None]
    return Case(model, J, reference.rows(plain, parameters), used)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", RULES)
def test_rows_of_every_kind(name: str, output: str) -> None:
    row, case = RULES[name], _case(output)
    J = case.jacobian.to(DEVICE)  # one of its own: blocks are kept in another form once used
    torch.manual_seed(0)
    expected_weights, expected = by_hand(row, row.new(), case.rows)
    parameters = reference.trainable(case.model)

    torch.manual_seed(0)
    weights = J.backward(row.new())

    assert [name for name, p in parameters.items() if p.grad is not None] == case.used
    found = gradient_of(case.model)
    if name.startswith("GradDrop") and len(case.used) < len(parameters):
        assert _is_kept_or_dropped(found, row.new(), case.rows)  # draws for the used alone
    else:
        close(found, expected, 1e-9 * size_of(case.rows, weights))
    if weights is not None and expected_weights is not None:
        assert weights.shape == J.output_shape
        size = max(1, float(weights.abs().max()))
        close(weights.reshape(-1).double(), expected_weights.double(), 1e-8 * size)


def _is_kept_or_dropped(found: Tensor, rule: Any, matrix: Tensor) -> bool:
    """GradDrop keeps, in every column, the rows of one sign, and some of the others' leaks."""
    leak = matrix.new_zeros(len(matrix)) if rule.leak is None else rule.leak
    up, down = matrix.clamp(min=0), matrix.clamp(max=0)
    choices = torch.stack([up.sum(0) + leak @ down, down.sum(0) + leak @ up])
    return float((found - choices).abs().amin(0).max()) < 1e-12


@pytest.mark.parametrize("name", ["GradDrop", "TrimmedMean"])
def test_rules_on_columns_hold_no_matrix(name: str) -> None:
    layers = [layer for _ in range(24) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(32, 1), nn.Flatten(0))
    J = Engine(model).jacobian(model(torch.randn(M, 32)))
    with peak_live_bytes() as peak:
        J.backward(RULES[name].new())
    assert peak.bytes < J.matrix().nbytes / 2


COUNTING = ["Mean", "MeanWeighting", "Sum", "Random", "Constant", "CRMOGM of Mean"]


@pytest.mark.parametrize("name", COUNTING)
def test_rules_that_count_rows_take_neither_gramian_nor_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in(torch.float32)
    J = Engine(model).jacobian(losses_of(model, 0))
    for costly in ("gramian", "matrix", "block", "norms"):
        monkeypatch.setattr(type(J), costly, None)
    J.backward(RULES[name].new())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_reach_rules_as_float32(dtype: torch.dtype) -> None:
    model = model_in(dtype)
    J = Engine(model).jacobian(losses_of(model, 0))
    rows = J.matrix().float()
    for name, row in RULES.items():
        torch.manual_seed(0)
        _, expected = by_hand(row, row.new(torch.float32), rows)

        torch.manual_seed(0)
        weights = J.to(DEVICE).backward(row.new(torch.float32))

        assert weights is None or weights.dtype == torch.float32
        found = gradient_of(model)
        assert found.dtype == dtype
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < 0.02 or name.startswith("GradDrop"), name  # which compares with coarse draws
