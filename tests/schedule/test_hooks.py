"""Hooks of the user's: on parameters, on modules, on tensors inside the model."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from posegrad import Engine, Mean, Min
from tests.models import FEATURES, MODELS
from tests.schedules import SCHEDULES


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hook_on_a_parameter_runs_once_on_the_sum(schedule: str) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(5, FEATURES, dtype=torch.float64)
    weight = model[0].weight
    seen: list[Tensor] = []

    def halve(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient / 2

    (expected,) = torch.autograd.grad(Min(2.0)(model(batch)[:, 0]), weight)
    handle = weight.register_hook(halve)
    Engine(model).combine(batch, Min(2.0), schedule=schedule).prediction.backward()
    assert len(seen) == 1
    torch.testing.assert_close(weight.grad, expected / 2)

    handle.remove()
    weight.grad = None
    Engine(model).combine(batch, Min(2.0), schedule=schedule).prediction.backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hook_after_accumulation_runs_once(schedule: str) -> None:
    model, counts = MODELS["mlp"](), Counter[str]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: counts.update([name]))
    Engine(model).combine(list(torch.randn(5, FEATURES)), Mean(), schedule=schedule)[0].backward()
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hook_on_a_pose_tensor_runs_once(schedule: str) -> None:
    batch, seen = torch.randn(5, FEATURES, requires_grad=True), []
    batch.register_hook(seen.append)
    Engine(MODELS["mlp"]()).combine(batch, Mean(), schedule=schedule).prediction.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], batch.grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_full_backward_hooks_of_modules_work(schedule: str) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(5, FEATURES, dtype=torch.float64)
    expected = torch.autograd.grad(2 * Mean()(model(batch)[:, 0]), model[0].weight)[0]
    model[-1].register_full_backward_hook(lambda module, into, out: tuple(2 * g for g in into))
    Engine(model).combine(batch, Mean(), schedule=schedule).prediction.backward()
    torch.testing.assert_close(model[0].weight.grad, expected)
