"""Per-pose clipping: the textbook's formula, and noise that is what it should be."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine
from posegrad.testing._seeded import seeded
from tests import reference

SIGMA, NORM = 1.7, 0.3


class Wide(nn.Module):
    """A layer with many parameters, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(300, 100), nn.Linear(200, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin().sum(1)


def _noisy(seed: int, **options: Any) -> Clip:
    generator = seeded(seed)
    return Clip(NORM, noise_multiplier=SIGMA, generator=generator, **options)


def _gradient(rule: Clip, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model, x = Wide().to(dtype), torch.randn(5, 300).to(dtype)
    Engine(model).backward(model(x), rule)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_is_algorithm_1_of_abadi_et_al() -> None:
    torch.manual_seed(0)
    model, x = Wide().double(), torch.randn(7, 300, dtype=torch.float64)
    losses, parameters = model(x).square(), reference.trainable(model)
    rows = reference.rows(losses, parameters)
    clipped = [g / max(1.0, float(g.norm()) / NORM) for g in rows]  # line 4
    generator = seeded(5)
    noise = [torch.randn(p.shape, generator=generator).reshape(-1) for p in parameters.values()]
    expected = sum(clipped) + SIGMA * NORM * torch.cat(noise)  # line 5, times the number of poses

    Engine(model).backward(losses, _noisy(5))

    found = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_noise_is_normal_with_the_stated_deviation() -> None:
    plain, noisy = _gradient(Clip(NORM)), _gradient(_noisy(0))
    z = torch.cat([(g - plain.get(n, 0)).reshape(-1) for n, g in noisy.items()]) / (SIGMA * NORM)
    count = len(z)
    assert count == 50200
    for power, moment in {1: 0, 2: 1, 3: 0, 4: 3}.items():  # of N(0, 1)
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / count)
        assert abs(float(z.pow(power).mean()) - moment) < 4 * spread, f"moment {power}"
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / math.sqrt(count)  # neighbours are unrelated


def test_noise_goes_to_parameters_that_nobody_uses() -> None:
    plain, noisy = _gradient(Clip(NORM)), _gradient(_noisy(0))
    assert {*noisy} - {*plain} == {"unused.weight", "unused.bias"}
    assert float(noisy["unused.weight"].std()) == pytest.approx(SIGMA * NORM, rel=0.03)


def test_noise_follows_the_generator_and_nothing_else() -> None:
    rule, twin, other = _noisy(0), _noisy(0), _noisy(1)
    first, again, differs = _gradient(rule), _gradient(twin), _gradient(other)
    second = _gradient(rule)
    for name, gradient in first.items():
        assert torch.equal(again[name], gradient)
        assert not torch.equal(differs[name], gradient)
        assert not torch.equal(second[name], gradient)
    assert all(torch.equal(g, second[n]) for n, g in _gradient(copy.deepcopy(twin)).items())


@pytest.mark.parametrize("rule", [Clip(NORM), _noisy(0)], ids=["plain", "noisy"])
def test_the_global_generator_is_left_alone(rule: Clip) -> None:
    torch.manual_seed(3)
    model, x = Wide(), torch.randn(5, 300)
    J = Engine(model).jacobian(model(x))
    before = torch.get_rng_state()
    J.backward(rule)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_in_every_precision(dtype: torch.dtype) -> None:
    noisy = _gradient(_noisy(0), dtype)
    assert {g.dtype for g in noisy.values()} == {dtype}
    assert float(noisy["unused.weight"].float().std()) == pytest.approx(SIGMA * NORM, rel=0.03)


def test_a_zero_row_is_left_as_it_is() -> None:
    model, x = nn.Linear(3, 1, bias=False), torch.tensor([[0.0, 0, 0], [3, 0, 4]])
    weights = Engine(model).backward(model(x).squeeze(1), Clip(1.0))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.2]))


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_the_greatest_norm_is_positive_and_finite(norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_norm is .*, but it must be positive and finite"):
        Clip(norm)


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_the_noise_is_not_negative(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"noise_multiplier is .*, but it must be"):
        Clip(1.0, noise_multiplier=sigma, generator=torch.Generator())


def test_noise_needs_a_generator() -> None:
    with pytest.raises(ValueError, match=r"no generator .*\nPass generator=torch.Generator"):
        Clip(1.0, noise_multiplier=1.0)
