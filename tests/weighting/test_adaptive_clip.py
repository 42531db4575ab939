"""A bound that follows a quantile: algorithm 1 of Andrew et al., and its noise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import AdaptiveClip, Clip, Engine, PosesMixError
from tests.device import seeded


def _losses(model: nn.Module, seed: int = 0) -> Tensor:
    poses = torch.randn(8, 3, generator=seeded(seed), dtype=torch.float64)
    return model(poses).squeeze(1).square()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _taken(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_a_step_is_clip_with_the_bound_of_before() -> None:
    model, rule = _model(), AdaptiveClip(0.25, max_norm=0.5, rate=0.3)
    engine, bound = Engine(model), 0.5
    for seed in range(5):
        norms = engine.jacobian(_losses(model, seed)).norms()
        weights = engine.backward(_losses(model, seed), rule)
        found = _taken(model)
        expected = engine.backward(_losses(model, seed), Clip(bound))
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(found, _taken(model))
        share = float((norms <= bound).double().mean())
        bound *= math.exp(-0.3 * (share - 0.25))
        assert rule.max_norm == pytest.approx(bound, rel=1e-12)


def test_the_bound_finds_the_quantile() -> None:
    model, rule = _model(), AdaptiveClip(0.5, max_norm=0.01)
    engine = Engine(model)
    for _ in range(100):
        engine.backward(_losses(model), rule)
    norms = engine.jacobian(_losses(model)).norms()
    below, above = norms.sort().values[3:5].tolist()
    assert 0.8 * below < rule.max_norm < 1.2 * above


def test_the_bound_moves_once_in_a_step_of_several_batches() -> None:
    model, rule, whole = _model(), AdaptiveClip(0.5, 0.5), AdaptiveClip(0.5, 0.5)
    engine = Engine(model)
    for half in (0, 1):
        rule.last(half == 1)
        engine.loss(_losses(model)[4 * half : 4 * half + 4], rule).backward()
        assert (rule.max_norm == 0.5) == (half == 0)
    engine.loss(_losses(model), whole).backward()
    assert rule.max_norm == pytest.approx(whole.max_norm, rel=1e-12)


def test_gradient_and_count_share_the_noise() -> None:
    model, generator = _model(), seeded(1)
    rule = AdaptiveClip(
        0.5, 0.5, noise_multiplier=1.2, count_noise=2.0, expected=8, generator=seeded(1)
    )
    engine = Engine(model)
    engine.backward(_losses(model), Clip(0.5))
    plain = _taken(model)
    norms = engine.jacobian(_losses(model)).norms()
    engine.backward(_losses(model), rule)
    deviation = 0.5 / math.sqrt(1.2**-2 - (2 * 2.0) ** -2)
    for found, gradient in zip(_taken(model), plain, strict=True):
        noise = deviation * torch.randn(gradient.shape, generator=generator)
        torch.testing.assert_close(found, gradient + noise, rtol=1e-6, atol=1e-6)
    beyond = float((norms <= 0.5).sum()) - len(norms) / 2  # by a half a pose that comes or goes
    beyond += 2.0 * float(torch.randn((), generator=generator))
    assert rule.max_norm == pytest.approx(0.5 * math.exp(-0.2 * beyond / 8), rel=1e-6)


def test_a_pose_that_comes_spends_no_more_than_is_stated() -> None:
    def one(values: list[float], count_noise: float) -> tuple[float, float, float]:
        model = nn.Linear(1, 1, bias=False).double()
        rule = AdaptiveClip(
            0.5, 1.0, rate=1.0, noise_multiplier=1.0, count_noise=count_noise, expected=10,
            generator=seeded(0),
        )  # fmt: skip
        greatest = rule.greatest
        x = torch.tensor(values, dtype=torch.float64)[:, None]
        Engine(model).backward(model(x).squeeze(1), rule)
        return model.weight.grad.item(), math.log(rule.max_norm), greatest

    for count_noise in (0.51, 1.0, 2.0):
        first, bound, greatest = one([0.5, 0.7], count_noise)
        other, moved, _ = one([0.5, 0.7, 1.0], count_noise)
        shift = math.hypot((other - first) / greatest, (moved - bound) / (count_noise / 10))
        assert shift < 1 + 1e-6  # in units of the noise: 1 / noise_multiplier


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend:UserWarning")
def test_what_was_refused_is_not_counted() -> None:
    rule = AdaptiveClip(0.5, noise_multiplier=1.2, expected=100, generator=seeded(0))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    for _ in range(2):
        losses = model(torch.randn(5, 3)).squeeze(1)
        with pytest.raises(PosesMixError, match="would not be private"):
            Engine(model).backward(losses, rule)
    assert rule.get_extra_state()["counted"] == (0.0, 0)


def test_its_state_is_saved_and_goes_on() -> None:
    def make(seed: int) -> AdaptiveClip:
        return AdaptiveClip(0.5, 0.5, noise_multiplier=1.2, expected=100, generator=seeded(seed))

    model, rule, other = _model(), make(0), make(9)
    engine = Engine(model)
    engine.backward(_losses(model), rule)
    rule.last(False)
    engine.backward(_losses(model, 1), rule)
    other.load_state_dict(rule.state_dict())
    rule.last(True)
    _taken(model)
    for each in (rule, other):
        engine.backward(_losses(model, 2), each)
    assert rule.max_norm == other.max_norm


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantile": 1.0}, "quantile is 1.0, but it lies between 0 and 1"),
        ({"quantile": 0.5, "max_norm": 0.0}, "max_norm is 0.0"),
        ({"quantile": 0.5, "rate": -1.0}, "rate is -1.0"),
        ({"quantile": 0.5, "noise_multiplier": 1.0}, "there is no generator"),
        (
            {"quantile": 0.5, "noise_multiplier": 1.0, "generator": torch.Generator("cpu")},
            "expected is not stated",
        ),
        (
            {
                "quantile": 0.5, "noise_multiplier": 1.0, "generator": torch.Generator("cpu"),
                "expected": 10,
            },
            "count_noise is 0.5, but it must be more than half",
        ),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaptiveClip(**options)
