"""Laws 1 and 2: every schedule, rule, model and chunking gives plain autograd's numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import AttentionPooling, Combination, Engine, Mean, Min
from posegrad.testing import assert_matches_autograd, poses, rules
from posegrad.testing.table import RULES as TABLE
from tests.combination.test_laws import RULES
from tests.device import DEVICE
from tests.models import BATCHED_ONLY, FEATURES, MODELS
from tests.schedules import SCHEDULES


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("rule", "chunk_size"),
    [("Mean()", 3), ("Min(1000)", 1), ("Min(1/kT)", 9), ("Boltzmann(kT)", 1), ("TopK(3)", 3)],
)
def test_every_model_matches_autograd(name: str, rule: str, chunk_size: int) -> None:
    """Other pairs of rule and chunking are drawn below."""
    if name in BATCHED_ONLY and chunk_size == 1:
        chunk_size = 2
    count = 8 if chunk_size == 2 else 9
    assert_matches_autograd(
        MODELS[name](), torch.randn(count, FEATURES), RULES[rule], chunk_size=chunk_size
    )


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if row.kind == "predictions"])
def test_every_rule_of_the_table_matches_autograd(name: str, chunk_size: int) -> None:
    row = TABLE[name]
    width = math.prod(row.components)
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, width))
    model.append(nn.Unflatten(-1, row.components or (1,)))
    assert_matches_autograd(
        model, torch.randn(9, FEATURES), row.make(), chunk_size=chunk_size, tolerance=1e-9
    )


@given(
    name=st.sampled_from(sorted(set(MODELS) - BATCHED_ONLY)),
    rule=rules(),
    batch=poses(features=FEATURES, max_poses=7),
    chunk_size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_drawn_cases_match_autograd(
    name: str, rule: Combination, batch: Tensor, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = MODELS[name]()
    # Sharp weights magnify rounding by the scale: the tolerance of law 1.
    tolerance = 1e-10 * max(1, 1e-4 * 1000 * 10)
    assert_matches_autograd(model, batch, rule, chunk_size=chunk_size, tolerance=tolerance)


@st.composite
def _networks(draw: st.DrawFn) -> nn.Module:
    """A feed-forward network of drawn depth, width, activations, norms and dropout."""
    layers: list[nn.Module] = []
    width = FEATURES
    for _ in range(draw(st.integers(0, 3))):
        new = draw(st.integers(1, 9))
        layers.append(nn.Linear(width, new, bias=draw(st.booleans())))
        makes: list[Callable[[], nn.Module]] = [
            nn.Tanh, nn.SiLU, lambda: nn.ReLU(inplace=True), lambda: nn.Dropout(0.3),
            lambda w=new: nn.LayerNorm(w), nn.Identity,
        ]  # fmt: skip
        layers.append(draw(st.sampled_from(makes))())
        if draw(st.booleans()):
            layers[-2].requires_grad_(False)
        width = new
    return nn.Sequential(*layers, nn.Linear(width, draw(st.sampled_from([1, 1, 3]))))


@given(
    st.data(), rules(), poses(features=FEATURES, max_poses=6), st.integers(1, 4), st.integers(0, 99)
)
def test_drawn_networks_match_autograd(
    data: st.DataObject, rule: Combination, batch: Tensor, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = data.draw(_networks())
    assert_matches_autograd(model, batch, rule, chunk_size=chunk_size, tolerance=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_trainable_rule_is_trained(chunk_size: int) -> None:
    assert_matches_autograd(
        MODELS["vector"](), torch.randn(9, FEATURES), AttentionPooling(3), chunk_size=chunk_size
    )


def test_a_trainable_scale_is_trained() -> None:
    rule = Min(nn.Parameter(torch.tensor(2.0)))
    assert_matches_autograd(MODELS["mlp"](), list(torch.randn(5, FEATURES)), rule)


def test_a_plain_function_is_a_rule() -> None:
    def softplus_mean(predictions: Tensor) -> Tensor:
        return nn.functional.softplus(predictions).mean(0)

    assert_matches_autograd(MODELS["mlp"](), list(torch.randn(5, FEATURES)), softplus_mean)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_the_poses_does_not_matter(schedule: str) -> None:
    model, batch = MODELS["mlp"]().double(), torch.randn(7, FEATURES, dtype=torch.float64)
    gradients = []
    for order in (torch.arange(7), torch.randperm(7)):
        model.zero_grad()
        Engine(model).combine(list(batch[order]), Min(2.0), schedule=schedule).prediction.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", ["Mean()", "Min(1000)", "Boltzmann(kT)"])
def test_float32_agrees_with_float64(schedule: str, rule: str) -> None:
    model, batch = MODELS["mlp"](), torch.randn(16, FEATURES)
    found = _gradient(model, batch, RULES[rule], schedule)
    exact = _gradient(model.double(), batch.double(), RULES[rule], "retain")
    assert (found.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_bfloat16_autocast_agrees_with_plain_autograd(
    schedule: str, inside: bool, chunk_size: int
) -> None:
    model, batch = MODELS["mlp"](), torch.randn(8, FEATURES)
    chunks = batch.unbind() if chunk_size == 1 else batch.split(chunk_size)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        rows = torch.cat([model(chunk).reshape(-1) for chunk in chunks])
    Min(1.0)(rows).float().square().backward()
    expected = _flat(model)

    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        engine = Engine(model, chunk_size=chunk_size)
        prediction, _ = engine.combine(batch, Min(1.0), schedule=schedule)
        if inside:
            prediction.float().square().backward()
    if not inside:
        prediction.float().square().backward()

    assert prediction.dtype == torch.bfloat16
    assert (_flat(model) - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits


def test_no_cast_made_without_graph_survives_in_the_autocast_cache() -> None:
    model, batch = MODELS["mlp"](), torch.randn(3, FEATURES)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        Engine(model).combine(list(batch), Min(), schedule="recompute")
        model(batch).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_half_precision_parameters_are_summed_in_float32() -> None:
    # 300 equal gradients of 1: bfloat16 cannot count beyond 256.
    model = nn.Linear(1, 1, bias=False).bfloat16()
    engine = Engine(model)
    batch = torch.ones(300, 1, dtype=torch.bfloat16)
    rule = lambda y: y.float().sum()  # noqa: E731
    engine.combine(list(batch), rule, schedule="recompute").prediction.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 300


def test_sparse_gradients_are_combined() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(0), nn.Linear(6, 1))
    batch = torch.tensor([[0, 1], [1, 2], [4, 4]])
    dense: list[Tensor] = []
    for schedule in SCHEDULES:
        model.zero_grad()
        Engine(model).combine(list(batch), Mean(), schedule=schedule).prediction.backward()
        gradient = model[0].weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        dense.append(gradient.to_dense())
    for other in dense[1:]:
        torch.testing.assert_close(other, dense[0])


def _gradient(model: nn.Module, batch: Tensor, rule: Any, schedule: str) -> Tensor:
    model.zero_grad()
    prediction, _ = Engine(model).combine(list(batch), rule, schedule=schedule)
    prediction.square().backward()
    return _flat(model)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
