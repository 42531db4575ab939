"""Per-pose clipping: the textbook's formula, and noise that is what it should be."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Clip, Engine, NoPosesError, PosesMixError
from posegrad.testing import peak_live_bytes
from tests import reference
from tests.device import seeded

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


def test_a_loss_that_was_reduced_is_warned_of() -> None:
    model = nn.Linear(3, 1)
    losses = model(torch.ones(4, 3)).square()
    with pytest.warns(UserWarning, match="reduced over its poses"):
        Engine(model).backward(losses.mean(), Clip(1.0))


def test_noise_needs_a_generator() -> None:
    with pytest.raises(ValueError, match=r"no generator .*\nPass generator=torch.Generator"):
        Clip(1.0, noise_multiplier=1.0)


def _rows_of(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """By parameter its rows `[m, *shape]`, by plain autograd; the graph is kept."""
    named = reference.trainable(model)
    flat = reference.rows(losses, named).split([p.numel() for p in named.values()], dim=1)
    return {n: part.reshape(-1, *p.shape) for (n, p), part in zip(named.items(), flat, strict=True)}


def _small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, model(torch.randn(6, 3, dtype=torch.float64)).squeeze(1).square()


def _shortened(rows: list[Tensor], norm: float, *, automatic: bool = False) -> list[Tensor]:
    """The sums of rows `[m, ...]` of a group of parameters, shortened together."""
    flat = torch.cat([r.flatten(1) for r in rows], dim=1)
    norms = flat.norm(dim=1)
    weights = norm / (norms + 0.01) if automatic else (norm / norms).clamp(max=1)
    return [torch.tensordot(weights, r, 1) for r in rows]


GROUPS = {"first": (["0.weight", "0.bias"], 0.2), "last": (["2.weight", "2.bias"], None)}


@pytest.mark.parametrize("mode", ["flat", "automatic"])
@pytest.mark.parametrize("by", ["all", "parameter", GROUPS], ids=["all", "parameter", "groups"])
def test_groups_are_shortened_each_by_itself(by: Any, mode: str) -> None:
    model, losses = _small()
    rows = _rows_of(model, losses)
    if by == "all":
        groups = [([*rows], NORM)]
    elif by == "parameter":
        groups = [([name], NORM / 2) for name in rows]  # of four
    else:
        groups = [(["0.weight", "0.bias"], 0.2), (["2.weight", "2.bias"], NORM / math.sqrt(2))]
    expected: dict[str, Tensor] = {}
    for names, norm in groups:
        sums = _shortened([rows[n] for n in names], norm, automatic=mode == "automatic")
        expected |= dict(zip(names, sums, strict=True))

    weights = Engine(model).backward(losses, Clip(NORM, by=by, mode=mode))

    assert (weights is None) == (by != "all")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12)


def test_the_value_of_a_loss_by_groups_is_the_mean() -> None:
    model, losses = _small()
    loss = Engine(model).loss(losses, Clip(NORM, by="parameter"))
    torch.testing.assert_close(loss.detach(), losses.detach().mean())


@pytest.mark.parametrize(
    ("by", "greatest"),
    [("all", NORM), ("parameter", NORM), (GROUPS, math.hypot(0.2, NORM / math.sqrt(2)))],
    ids=["all", "parameter", "groups"],
)
def test_the_noise_is_that_of_what_one_pose_can_move(by: Any, greatest: float) -> None:
    model, losses = _small()
    Engine(model).backward(losses, Clip(NORM, by=by))
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model, losses = _small()
    Engine(model).backward(losses, _noisy(4, by=by))
    generator = seeded(4)
    for p, g in zip(model.parameters(), plain, strict=True):
        noise = SIGMA * greatest * torch.randn(p.shape, generator=generator)
        torch.testing.assert_close(p.grad, g + noise, rtol=1e-6, atol=1e-6)


def test_groups_name_every_parameter_once() -> None:
    model, losses = _small()
    by = {"a": (["0.weight", "0.bias", "3.weight"], 1.0), "b": (["0.bias"], 1.0)}
    with pytest.raises(
        ValueError, match=r"unknown: 3\.weight; in several groups: 0\.bias; in none: 2\.weight"
    ):
        Engine(model).backward(losses, Clip(1.0, by=by))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"by": "layer"}, "by='layer' is unknown"),
        ({"by": {}}, "by is an empty dict"),
        ({"by": {"a": (["x"], 0.0)}}, "the norm of group 'a' is 0.0"),
        ({"mode": "hard"}, "mode='hard' is unknown"),
        ({"mode": "automatic", "gamma": 0.0}, "gamma is 0.0"),
    ],
)
def test_other_words_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Clip(1.0, **options)


def test_noise_is_drawn_once_in_a_step_of_several_batches() -> None:
    rule, generator = _noisy(0), seeded(0)
    model, _ = _small()
    engine = Engine(model)
    batches = [torch.randn(6, 3, dtype=torch.float64) for _ in range(3)]
    for number, batch in enumerate(batches):
        rule.last(number == 2)
        engine.backward(model(batch).squeeze(1).square(), rule)
    noisy = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for batch in batches:
        engine.backward(model(batch).squeeze(1).square(), Clip(NORM))
    for found, p in zip(noisy, model.parameters(), strict=True):
        noise = SIGMA * NORM * torch.randn(p.shape, generator=generator)
        torch.testing.assert_close(found, p.grad + noise, rtol=1e-6, atol=1e-6)


def test_an_output_without_rows_is_noise_alone() -> None:
    generator = seeded(0)
    model, losses = _small()
    engine = Engine(model)
    engine.backward(losses[:0], _noisy(0))
    for p in model.parameters():
        noise = SIGMA * NORM * torch.randn(p.shape, generator=generator)
        torch.testing.assert_close(p.grad, noise.double(), rtol=1e-6, atol=1e-6)
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = engine.loss(losses.detach()[:0], _noisy(0))
    assert float(loss.detach()) == 0
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], before)
    with pytest.raises(NoPosesError, match=r"shape \[0\]"):
        engine.backward(losses[:0], Clip(NORM))


@pytest.mark.filterwarnings("ignore:The predictions of different poses depend:UserWarning")
def test_noise_hides_no_pose_that_moves_others() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    losses = model(torch.randn(6, 3)).squeeze(1)
    with pytest.raises(PosesMixError, match=r"(?s)0\.weight.*would not be private"):
        Engine(model).backward(losses, _noisy(0))
    assert all(p.grad is None for p in model.parameters())
    Engine(model.eval()).backward(model(torch.randn(6, 3)).squeeze(1), _noisy(0))


def test_layers_that_are_clipped_alone_are_let_go_of_one_by_one() -> None:
    width, depth, m = 256, 8, 128  # what a layer holds is as large as its gradient
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    x, factors = torch.randn(m, width), 2 * depth * m * width * 4
    peaks = {}
    for by in ("all", "parameter"):
        engine = Engine(model)
        for _ in range(3):
            model.zero_grad()
            losses = model(x).squeeze(1)
            with peak_live_bytes() as peak:
                engine.backward(losses, Clip(NORM, by=by))
        peaks[by] = peak.bytes
    assert peaks["parameter"] < peaks["all"] - factors / 3


def test_a_jacobian_that_is_seen_keeps_its_rows() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    J = Engine(model).jacobian(model(torch.randn(6, 3)).squeeze(1))
    before = J.matrix()
    J.backward(Clip(NORM, by="parameter"))
    torch.testing.assert_close(J.matrix(), before)


def test_noise_refuses_a_few_losses_that_nobody_followed() -> None:
    """Rows of a few numbers put together are taken one by one, without a look at poses."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    engine = Engine(model)
    for _ in range(3):
        scores = model(torch.randn(4, 3)).squeeze(1)
        losses = torch.stack([score.square() for score in scores])
        with pytest.raises(PosesMixError, match=r"(?s)0\.weight.*would not be private"):
            engine.backward(losses, _noisy(0))
    scores = model.eval()(torch.randn(4, 3)).squeeze(1)
    engine.backward(torch.stack([score.square() for score in scores]), _noisy(0))


def test_the_random_state_is_saved_and_goes_on() -> None:
    rule, other = _noisy(0), _noisy(9)
    _gradient(rule)
    other.load_state_dict(rule.state_dict())
    first, again = _gradient(rule), _gradient(other)
    assert all(torch.equal(g, again[name]) for name, g in first.items())
    assert Clip(NORM).state_dict() == {"_extra_state": {}}


USERS = torch.tensor([0, 1, 0, 2, 2, 1])
POOLED = {
    "users": lambda y: torch.zeros(3, dtype=y.dtype).index_add(0, USERS, y),
    "microbatches": lambda y: y.view(3, 2).mean(1),
}


@pytest.mark.parametrize("name", POOLED)
def test_losses_pooled_by_user_or_microbatch_are_shortened_as_such(name: str) -> None:
    model, losses = _small()
    pooled = POOLED[name](losses)
    rows = _rows_of(model, pooled)
    expected = _shortened([*rows.values()], NORM)
    J = Engine(model).jacobian(pooled)
    assert not J.mixed
    assert all("closed form" in path for paths in J.paths.values() for path in paths)
    J.backward(Clip(NORM))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)
