"""Equations 1 to 9 of the source documents, with numbers worked by hand.

Two poses scored by f(x) = theta x at theta = 1, x = (1, 2): predictions (1, 2), gradients (1, 2).
"""

import math

import pytest
import torch
from torch import Tensor, nn

from posegrad import Combined, Engine, Max, Mean, Min, Sum
from tests.schedules import SCHEDULES

LN2 = math.log(2)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x


def _combined(rule: nn.Module, x: list[float], schedule: str) -> tuple[Line, Combined]:
    model = Line()
    poses = [torch.tensor(value, dtype=torch.float64) for value in x]
    return model, Engine(model).combine(poses, rule, schedule=schedule)


def _gradient(model: Line) -> float:
    assert model.theta.grad is not None
    return float(model.theta.grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equation_1_loss_of_the_combined_prediction(schedule: str) -> None:
    # L = y^2 with y = 3 theta: dL/dtheta = 2 y dy/dtheta = 2 * 3 * 3.
    model, (prediction, _) = _combined(Sum(), [1, 2], schedule)
    prediction.square().backward()
    assert _gradient(model) == pytest.approx(18)


@pytest.mark.parametrize("schedule", ["retain", "store", "recompute"])
def test_equation_2_loss_linear_in_the_per_pose_predictions(schedule: str) -> None:
    # L = 5 y_1 - 3 y_2: dL/dtheta = 5 * 1 - 3 * 2.
    model, (_, per_pose) = _combined(Sum(), [1, 2], schedule)
    (5 * per_pose[0] - 3 * per_pose[1]).backward()
    assert _gradient(model) == pytest.approx(-1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equations_3_and_4_mean(schedule: str) -> None:
    # (1 + 2)/2 and (1 + 2)/2.
    model, (prediction, _) = _combined(Mean(), [1, 2], schedule)
    prediction.backward()
    assert prediction.item() == pytest.approx(1.5)
    assert _gradient(model) == pytest.approx(1.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equations_5_to_9_maximum(schedule: str) -> None:
    # t = ln 2, n = 1: exp(n t y) = 2^y = (2, 4); Q = ln 6; y = ln 6 / ln 2; weights (1/3, 2/3).
    model, (prediction, _) = _combined(Max(LN2), [1, 2], schedule)
    prediction.backward()
    assert prediction.item() == pytest.approx(math.log2(6))
    assert _gradient(model) == pytest.approx(1 / 3 * 1 + 2 / 3 * 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equations_5_to_9_minimum(schedule: str) -> None:
    # n = -1: exp(n t y) = 2^-y = (1/2, 1/4); Q = ln 3/4; y = -log2(3/4); weights (2/3, 1/3).
    model, (prediction, _) = _combined(Min(LN2), [1, 2], schedule)
    prediction.backward()
    assert prediction.item() == pytest.approx(-math.log2(0.75))
    assert _gradient(model) == pytest.approx(2 / 3 * 1 + 1 / 3 * 2)


@pytest.mark.parametrize("schedule", ["retain", "store", "recompute"])
def test_equations_1_and_2_together(schedule: str) -> None:
    # L = y + y_2 with the minimum above: 4/3 + 2.
    model, (prediction, per_pose) = _combined(Min(LN2), [1, 2], schedule)
    (prediction + per_pose[1]).backward()
    assert _gradient(model) == pytest.approx(4 / 3 + 2)
