"""Bad rules and bad rows raise their named error, and leave every `.grad` alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation as theirs

from posegrad import (
    Aggregation,
    Clip,
    Engine,
    Mean,
    Median,
    Min,
    NonFiniteGradientError,
    NonFinitePredictionError,
    NotDifferentiableError,
    PosegradError,
    Projected,
    ShapeMismatchError,
    TrimmedMean,
    Weighting,
)
from tests.device import seeded
from tests.models import FEATURES, MODELS
from tests.reference import untouched

Scores = Callable[[nn.Module], Tensor]


def _poses() -> Tensor:
    return torch.randn(6, FEATURES, generator=seeded(1))


def _scores(model: nn.Module) -> Tensor:
    return model(_poses()).squeeze(1)


def _scaled(*factors: float) -> Scores:
    """Predictions and rows times numbers."""
    return lambda model: _scores(model) * torch.tensor(factors)


def _nan_behind_finite_predictions(model: nn.Module) -> Tensor:
    y = _scores(model)
    return y + torch.where(torch.arange(6) == 2, 0 * y, 1.0).sqrt()  # inf * 0 at row 2


def _vectors(model: nn.Module) -> Tensor:
    return torch.stack([_scores(model), _scores(model).sin()], dim=1)


class Weights(Weighting):
    """The same weights for any rows."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return self.values


class Whole(Aggregation):
    """Forgets to reduce."""

    def forward(self, block: Tensor) -> Tensor:
        return block


class Unrelated(nn.Module):
    """A rule whose result depends on its own parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor) -> Tensor:
        return self.weight * predictions.detach().sum()


def _noisy() -> Clip:
    return Clip(1.0, noise_multiplier=1.0, generator=seeded(0))


@dataclass
class Bad:
    """A rule and an output that cannot go together."""

    rule: Callable[[], Any]
    error: type[Exception]
    match: str
    output: Scores = _scores


ROWS = r"gradients of 2 of 6 rows, or their squares, are not finite: rows 1, 4.\n.*no .grad was"
NAN_AND_INF = _scaled(1, math.nan, 1, 1, math.inf, 1)

BAD: dict[str, Bad] = {
    "nan and inf, Clip": Bad(lambda: Clip(1.0), NonFiniteGradientError, ROWS, NAN_AND_INF),
    "nan and inf, Clip with noise": Bad(_noisy, NonFiniteGradientError, ROWS, NAN_AND_INF),
    "nan and inf, Projected": Bad(
        lambda: Projected(Mean(), theirs.UPGradWeighting),
        NonFiniteGradientError,
        ROWS,
        NAN_AND_INF,
    ),
    "nan and inf, a weighting that would not care": Bad(
        lambda: Weights(*[1] * 6), NonFiniteGradientError, ROWS, NAN_AND_INF
    ),
    "nan behind finite predictions": Bad(
        lambda: Clip(1.0),
        NonFiniteGradientError,
        "1 of 6 .* rows 2",
        _nan_behind_finite_predictions,
    ),
    "products that overflow": Bad(
        lambda: theirs.UPGradWeighting(),
        NonFiniteGradientError,
        "6 of 6 .* rows .* and 1 more",
        _scaled(*[1e25] * 6),
    ),
    "nan and inf, a combination rule": Bad(
        lambda: Min(1.0),
        NonFinitePredictionError,
        r"2 of 6 predictions are not finite: numbers 1, 4.\n.*no .grad was touched",
        NAN_AND_INF,
    ),
    "too few weights": Bad(
        lambda: Weights(1, 2), ShapeMismatchError, r"Weights gave weights of shape \[2\] for 6 rows"
    ),
    "too many dimensions": Bad(
        lambda: Weights(*[1] * 12),
        ShapeMismatchError,
        r"shape \[12\] for 6 rows.\nReturn one weight for each row, \[6\]",
    ),
    "weights that are nan": Bad(
        lambda: Weights(1, 1, 1, math.nan, 1, 1),
        NonFiniteGradientError,
        r"Weights gave weights that are not finite: 1, 1, 1, nan, 1 and 1 more.\nThe rows are",
    ),
    "an aggregation that does not reduce": Bad(
        Whole,
        ShapeMismatchError,
        r"Whole made \[6, 8, 6\] of the rows of 0.weight.*\nReduce dimension 0",
    ),
    "too few rows to trim": Bad(
        lambda: TrimmedMean(3), ShapeMismatchError, r"leaves out 6 rows, and there are 6.\nTrim at"
    ),
    "noise for vectors": Bad(
        _noisy, ShapeMismatchError, r"output has shape \[6, 2\].*\n.*one loss for each", _vectors
    ),
    "a rule that gives a vector": Bad(
        lambda: lambda y: y.cumsum(0), ShapeMismatchError, r"to \[6\], but a backward needs one"
    ),
    "a rule that is cut off": Bad(
        lambda: lambda y: y.detach().sum(), NotDifferentiableError, "does not depend on the pred"
    ),
    "a rule that looks elsewhere": Bad(
        Unrelated, NotDifferentiableError, "does not depend on the predictions.*\nRemove the detach"
    ),
    "a class of ours": Bad(lambda: Median, TypeError, "is the class Median, not an instance"),
    "a class of TorchJD's": Bad(
        lambda: theirs.UPGradWeighting, TypeError, "is the class UPGradWeighting, not an instance"
    ),
    "no rule at all": Bad(lambda: 3.0, TypeError, "The rule is 3.0; it must be"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mark", [7.0, None])
def test_what_cannot_be_served_raises_and_touches_nothing(name: str, mark: float | None) -> None:
    bad, model = BAD[name], MODELS["mlp"]()
    rule = bad.rule()

    with untouched(model, mark):
        J = Engine(model).jacobian(bad.output(model))
        with pytest.raises(bad.error, match=r"(?s)" + bad.match) as raised:
            J.backward(rule)

    assert isinstance(raised.value, PosegradError) or bad.error is TypeError
    own = list(rule.parameters()) if isinstance(rule, nn.Module) else []
    assert all(p.grad is None for p in own)
    J.backward(torch.ones(J.output_shape))  # which still serves
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "rule",
    [
        Clip(1.0),
        Median(),
        Projected(Mean(), theirs.UPGradWeighting),
        theirs.UPGrad(),
        theirs.UPGradWeighting(),
        theirs.ConFIG(),
        theirs.Mean(),
    ],
    ids=lambda rule: type(rule).__module__ + "." + type(rule).__name__,
)
def test_combine_refuses_rules_that_look_at_gradients(rule: Any) -> None:
    engine = Engine(MODELS["mlp"]())
    match = rf"{type(rule).__name__} looks at gradients, .*\nUse engine.gather\(poses\).backward"
    with pytest.raises(TypeError, match=match):
        engine.combine(_poses(), rule)
    with pytest.raises(TypeError, match=match):
        engine.plan(_poses(), rule)
    engine.gather(_poses()).backward(rule)  # as it says


def test_rows_that_are_nan_are_seen_through_an_aggregation() -> None:
    model = MODELS["mlp"]()
    Engine(model).backward(NAN_AND_INF(model), TrimmedMean(2))
    assert all(bool(p.grad.isnan().all()) for p in model.parameters())
