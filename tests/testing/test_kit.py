"""The testing kit fails when it should, and measures what it says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Combination, Mean, Min, MissingExtraError, OnlineForm
from posegrad.testing import (
    assert_combination,
    assert_matches_autograd,
    peak_live_bytes,
    poses,
)
from tests.models import FEATURES, MODELS


def _first(predictions: Tensor) -> Tensor:
    return predictions[0]


def _twice(predictions: Tensor) -> Tensor:
    return 2 * predictions.mean(0)


def _square(predictions: Tensor) -> Tensor:
    return predictions.square().mean(0).sqrt()


def _cut(predictions: Tensor) -> Tensor:
    return predictions.mean(0) + predictions.detach().mean(0) - predictions.detach().mean(0).clone()


class _Noisy(Combination):
    def forward(self, predictions: Tensor) -> Tensor:
        return (
            predictions.mean(0) + 1e-12 * torch.rand(()) if len(predictions) > 1 else predictions[0]
        )


class _WrongForm(Combination):
    """The smooth minimum with the mean's online form."""

    def forward(self, predictions: Tensor) -> Tensor:
        return Min(1.0)(predictions)

    def online(self) -> OnlineForm | None:
        return Mean().online()


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predictions: Tensor) -> Tensor:
        ctx.count = len(predictions)
        return predictions.mean(0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return (1.1 * cotangent / ctx.count).expand(ctx.count)


BROKEN = {
    "order": (_first, "the order of the poses does not matter"),
    "identity": (_twice, "one prediction is its own combination"),
    "identity, sign": (_square, "one prediction is its own combination"),
    "repeat": (_Noisy(), "equal calls give equal numbers|order of the poses"),
    "online": (_WrongForm(), "online form gives the rule's weights"),
    "gradient": (_WrongGradient.apply, "Jacobian mismatch"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_caught(name: str) -> None:
    rule, match = BROKEN[name]
    with pytest.raises((AssertionError, RuntimeError), match=match):
        assert_combination(rule)


def test_a_rule_without_shift_law_is_caught() -> None:
    def soft(predictions: Tensor) -> Tensor:
        weights = torch.softmax(predictions.abs(), dim=0)
        return (weights * predictions).sum(0)

    assert_combination(soft, shift_equivariant=False)
    with pytest.raises(AssertionError, match="adding a constant"):
        assert_combination(soft)


class _Lying(nn.Module):
    """Scores differently with and without a graph, as a bad custom kernel might."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.linear(pose) + (0.0 if torch.is_grad_enabled() else 0.1)


def test_a_model_that_disagrees_with_itself_is_caught() -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"per_pose|Scored again"):
        assert_matches_autograd(_Lying(), list(torch.randn(4, FEATURES)), Mean(), chunk_size=1)


def test_the_oracle_touches_nothing() -> None:
    model, batch = MODELS["batch norm, training"](), torch.randn(4, FEATURES, requires_grad=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert_matches_autograd(model, batch, Mean(), chunk_size=2)
    assert all(p.grad is None for p in (*model.parameters(), batch))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_wrong_engine_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from posegrad.schedule import recompute

    monkeypatch.setattr(recompute, "flush_denormals", lambda weights: 1.001 * weights)
    with pytest.raises(AssertionError, match=r"schedule='recompute', module 0, .*grad"):
        assert_matches_autograd(MODELS["mlp"](), list(torch.randn(4, FEATURES)), Mean())


def test_peak_bytes_count_new_tensors_once() -> None:
    outside = torch.ones(1000)
    with peak_live_bytes() as peak:
        view = outside[10:].view(-1)  # shares memory that was there before
        a = torch.ones(256)  # 1024 bytes
        b = a.view(16, 16) + 1  # 1024 more; the view is free
        del a
        c = b * 2
        outside.add_(1)
    assert peak.bytes == 2048
    assert peak.live == 2048
    assert view.numel() + c.numel() > 0


def test_peak_bytes_see_backward() -> None:
    x = torch.ones(1024, requires_grad=True)
    with peak_live_bytes() as peak:
        (x.exp() * x.sin()).sum().backward()
    assert peak.bytes >= 4 * 4096
    assert peak.live == 4096  # x.grad


def test_peak_bytes_survive_an_exception() -> None:
    def fail() -> None:
        torch.ones(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), peak_live_bytes() as peak:
        fail()
    assert peak.bytes == 16


def test_without_hypothesis_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hypothesis.strategies", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'posegrad\[testing\]'"):
        poses(features=3)
    assert issubclass(MissingExtraError, ImportError)


def test_strategies_draw_what_they_say() -> None:
    from hypothesis import given, settings

    @settings(max_examples=20)
    @given(poses(features=3, max_poses=4, dtype=torch.float32))
    def check(batch: Tensor) -> None:
        assert 1 <= len(batch) <= 4
        assert batch.shape[1:] == (3,)
        assert batch.dtype == torch.float32

    check()
