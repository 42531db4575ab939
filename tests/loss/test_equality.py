"""`engine.loss(...).backward()` leaves in `.grad` what `engine.backward(...)` leaves there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchjd import aggregation as theirs

from posegrad import Clip, Engine, Max, Mean, Median, Min, SignAgreement
from tests.architectures import ARCHITECTURES, Architecture
from tests.reference import trainable
from tests.weighting.table import RULES

EXACT = [name for name, row in ARCHITECTURES.items() if row.exact]
MANY_ROWS = {name: row.make for name, row in RULES.items()} | {
    "UPGrad": theirs.UPGradWeighting,
    "UPGrad, aggregator": theirs.UPGrad,
    "PCGrad": lambda: theirs.PCGradWeighting(),
    "IMTLG": theirs.IMTLG,
    "ConFIG": theirs.ConFIG,
    "their TrimmedMean": lambda: theirs.TrimmedMean(1),
    "Mean": Mean,
    "Max": lambda: Max(scale=0.7),
    "Min": lambda: Min(scale=2.0),
    "a function": lambda: lambda y: y.square().sum(),
}


def _left(model: nn.Module) -> dict[str, Tensor | None]:
    """`.grad` by name, which is None afterwards."""
    named = trainable(model)
    found = {n: None if p.grad is None else p.grad.to_dense() for n, p in named.items()}
    for p in named.values():
        p.grad = None
    return found


def _check(name: str, rule: Any, seed: int = 0, scale: float = 1.0) -> None:
    row = ARCHITECTURES[name]
    model, twin = _built(row), _built(row)  # two, for some forwards change the model
    expected, output, weights = _stepped(row, model, seed, lambda e, y: e.backward(y, rule))
    found, _, loss = _stepped(row, twin, seed, lambda e, y: _differentiated(e, y, rule, scale))

    assert loss is not None
    assert loss.shape == ()
    value = output.mean() if weights is None else (weights.double() * output).sum()
    torch.testing.assert_close(loss.double(), value.double(), rtol=row.tolerance, atol=1e-12)
    tolerance = 1e-12 if row.dtype == torch.float64 else row.tolerance
    for key, gradient in expected.items():
        if gradient is None:
            assert found[key] is None, key
            continue
        size = scale * float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            found[key], scale * gradient, rtol=tolerance, atol=tolerance * size
        )


def _built(row: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return row.build()


def _differentiated(engine: Engine, output: Tensor, rule: Any, scale: float) -> Tensor:
    loss = engine.loss(output, rule)
    (scale * loss).backward()
    return loss.detach()


def _stepped(
    row: Architecture, model: nn.Module, seed: int, step: Callable[[Engine, Tensor], Tensor | None]
) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None]:
    """What the second step leaves in `.grad`, the output, and what the step returns."""
    engine = Engine(model, check="never")
    step(engine, row.output(model, seed))
    _left(model)
    torch.manual_seed(seed)
    output = row.output(model, seed)
    returned = step(engine, output)
    return _left(model), output.detach(), returned


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", EXACT)
def test_any_architecture(name: str) -> None:
    _check(name, Clip(0.5))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rule", MANY_ROWS)
@pytest.mark.parametrize(
    "name", ["MLP", "TransformerEncoder", "Tied, chained", "Unused and frozen"]
)
def test_any_rule(name: str, rule: str) -> None:
    _check(name, MANY_ROWS[rule](), scale=3.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    name=st.sampled_from(EXACT),
    seed=st.integers(0, 99),
    rule=st.sampled_from(
        [Clip(0.3), Clip(3.0), Max(scale=0.2), Mean(), Median(), SignAgreement(0.5)]
    ),
    scale=st.sampled_from([1.0, 0.25, 2.0**16]),
)
def test_drawn_architectures_and_rules(name: str, seed: int, rule: Any, scale: float) -> None:
    _check(name, rule, seed, scale)


def test_weights_that_are_given() -> None:
    row = ARCHITECTURES["MLP"]
    model = row.build()
    _check("MLP", torch.linspace(-1, 1, row.output(model, 0).numel(), dtype=torch.float64))
