"""Rules of several outputs, modules as rules, dropout in a rule: plain autograd's numbers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from posegrad import AttentionPooling, Combined, Engine, Mean, MultiPose, OnlineForm
from posegrad.combination import Combination
from posegrad.testing import assert_combination, assert_matches_autograd
from tests.models import FEATURES, MODELS

D, CLASSES = 3, 2
SCHEDULES = ["auto", "retain", "store", "recompute"]


class Gated(nn.Module):
    """ABMIL: gated attention with dropout, logits; the attention beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPooling(D, hidden=5, gated=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, CLASSES))

    def forward(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        instances = nn.functional.dropout(instances, 0.3, self.training)
        return self.head(self.pool(instances)), self.pool.attention(instances)


class Dual(nn.Module):
    """DSMIL: the instance of the highest score asks all others; both streams' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(D, CLASSES)
        self.query = nn.Linear(D, 4)
        self.head = nn.Conv1d(CLASSES, CLASSES, D)

    def forward(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(instances)  # [m, classes]
        queries = self.query(instances)
        critical = queries[scores.argmax(dim=0)]  # [classes, 4]
        attention = torch.softmax(queries @ critical.T / 2, dim=0)
        bags = attention.T @ instances  # [classes, d]
        return self.head(bags[None]).reshape(CLASSES), scores.amax(dim=0)


class Tokens(nn.Module):
    """TransMIL in outline: self-attention among instances and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, D))
        self.layer = nn.TransformerEncoderLayer(D, 1, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, instances: Tensor) -> Tensor:
        return self.head(self.layer(torch.cat([self.token, instances])[None])[0, 0])


class Clustered(nn.Module):
    """CLAM: a bag's logits, and a loss of its most and least attended instances."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AttentionPooling(D, gated=True)
        self.head = nn.Linear(D, CLASSES)
        self.instances = nn.Linear(D, 2)

    def forward(self, instances: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        order = self.pool.attention(instances).argsort()
        logits = self.instances(instances[order[[0, -1]]] * (1 + label))
        return self.head(self.pool(instances)), nn.functional.cross_entropy(
            logits, torch.tensor([0, 1])
        )


RULES: dict[str, Callable[[], nn.Module]] = {
    "ABMIL": Gated,
    "DSMIL": Dual,
    "TransMIL": Tokens,
}


def _loss(combined: Combined) -> Tensor:
    """One that uses every output."""
    target = torch.tensor([1.0, -1.0], dtype=torch.float64)
    total = (combined.prediction - target).square().sum()
    return total + sum(((i + 2) * e).exp().sum() for i, e in enumerate(combined.extra))


def _step(
    model: nn.Module, rule: Any, trained: nn.Module, combine: Callable[[nn.Module, Any], Combined]
) -> dict[str, Any]:
    for module in (model, trained):
        module.zero_grad()
    torch.manual_seed(5)
    combined = combine(model, rule)
    _loss(combined).backward()
    named = {**dict(model.named_parameters()), **dict(trained.named_parameters())}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    return {
        "grads": grads,
        "outputs": [t.detach() for t in combined],
        "random state": torch.get_rng_state(),
    }


def _compared(rule: Any, trained: nn.Module, count: int, chunk_size: int, schedule: str) -> None:
    model = nn.Sequential(MODELS["dropout"](), nn.Linear(1, D), nn.Tanh()).double()
    poses = torch.randn(count, FEATURES, dtype=torch.float64)

    def plain(model: nn.Module, rule: Any) -> Combined:
        per_pose = torch.cat([model(chunk) for chunk in poses.split(chunk_size)])
        return Combined.of(rule(per_pose), per_pose)

    def engine(model: nn.Module, rule: Any) -> Combined:
        return Engine(model, chunk_size=chunk_size).combine(poses, rule, schedule=schedule)

    found, expected = (_step(model, rule, trained, combine) for combine in (engine, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@given(
    name=st.sampled_from(sorted(RULES)),
    schedule=st.sampled_from(SCHEDULES),
    count=st.integers(2, 8),
    chunk_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_any_module_is_a_rule(
    name: str, schedule: str, count: int, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rule = RULES[name]().double()
    _compared(rule, rule, count, chunk_size, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rule_closes_over_the_label(schedule: str) -> None:
    module, label = Clustered().double(), torch.tensor(1.0, dtype=torch.float64)
    _compared(lambda y: module(y, label), module, 7, 3, schedule)


def test_a_prediction_and_its_index() -> None:
    poses = torch.tensor([[3.0], [1.0], [2.0]])
    combined = Engine(nn.Identity()).combine(poses, lambda y: y.min(dim=0), schedule="auto")
    assert (combined.prediction.item(), combined.extra) == (1.0, (torch.tensor(1),))


class Spread(Combination):
    """The mean, and how far the poses are spread around it."""

    def forward(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        return predictions.mean(dim=0), predictions.std(dim=0, correction=0)

    def online(self) -> OnlineForm | None:
        return Mean().online()


def test_groups_have_their_own_extras() -> None:
    model, poses = MODELS["mlp"]().double(), torch.randn(7, FEATURES, dtype=torch.float64)
    groups = torch.tensor([1, 0, 0, 1, 1, 0, 1])
    combined = Engine(model, chunk_size=2).combine(poses, Spread(), groups=groups)
    expected = [Spread()(model(poses)[groups == group, 0]) for group in (0, 1)]
    means, spreads = map(torch.stack, zip(*expected, strict=True))
    torch.testing.assert_close(combined.prediction, means)
    torch.testing.assert_close(combined.extra, (spreads,))


def test_more_than_one_output_is_never_streamed() -> None:
    model, poses = MODELS["mlp"]().double(), torch.randn(7, FEATURES, dtype=torch.float64)
    engine = Engine(model, chunk_size=2)
    combined = engine.combine(poses, Spread())
    (found,) = torch.autograd.grad(combined.extra[0], model[0].weight)
    (expected,) = torch.autograd.grad(Spread()(model(poses)[:, 0])[1], model[0].weight)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"cannot stream: .* more than the combined prediction"):
        engine.combine(poses, Spread(), schedule="stream")


def test_the_laws_of_rules_are_those_of_the_first_output() -> None:
    assert_combination(Spread())
    rule = lambda y: (y.std(0), y.mean(0))  # noqa: E731
    assert_matches_autograd(MODELS["mlp"](), torch.randn(5, FEATURES), rule, chunk_size=2)
    torch.testing.assert_close(Spread().weights(torch.randn(4)), torch.full((4,), 0.25))


def test_a_rule_of_several_outputs_weighs_rows() -> None:
    model = nn.Linear(3, 1)
    losses = model(torch.ones(2, 3)).squeeze(1)
    weights = Engine(model).backward(losses, Spread())
    torch.testing.assert_close(weights, torch.full((2,), 0.5))


def test_combined_is_a_pair_and_what_follows() -> None:
    parts = tuple(torch.tensor([float(i)]) for i in range(4))
    combined = Combined(*parts)
    assert (combined.prediction, combined.per_pose) == parts[:2]
    assert combined.extra == parts[2:]
    assert Combined(*parts[:2]).extra == ()
    assert repr(combined).startswith("Combined(prediction=tensor([0.]), per_pose=tensor([1.]), ex")
    assert "extra" not in repr(Combined(*parts[:2]))
    for other in (copy.copy(combined), pickle.loads(pickle.dumps(combined))):
        assert isinstance(other, Combined)
        assert other.extra == parts[2:]
    doubled = pytree.tree_map(lambda t: 2 * t, combined)  # as DDP does with what a module returns
    assert isinstance(doubled, Combined)
    assert [t.item() for t in doubled] == [0, 2, 4, 6]


def test_multipose_hands_on_what_the_rule_returns() -> None:
    module = MultiPose(nn.Linear(FEATURES, D), Gated().eval(), chunk_size=2)
    combined = module(torch.randn(5, FEATURES))
    assert [list(t.shape) for t in combined] == [[CLASSES], [5, D], [5]]
    assert "rule.function.head.1.weight" in module.state_dict()


def test_gated_attention_is_equation_9() -> None:
    rule, instances = AttentionPooling(D, hidden=4, gated=True), torch.randn(6, D)
    V, U, w = rule.hidden.weight, rule.gate.weight, rule.score.weight[0]
    scores = torch.stack([(w * torch.tanh(V @ h) * torch.sigmoid(U @ h)).sum() for h in instances])
    weights = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(rule.attention(instances), weights)
    torch.testing.assert_close(rule(instances), weights @ instances)
    assert rule.attention(instances).sum().item() == pytest.approx(1.0)
