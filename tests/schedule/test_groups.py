"""Several groups of poses in one call: every schedule, rule and chunking, any order of poses."""

from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import (
    AttentionPooling,
    Combination,
    Engine,
    Mean,
    Min,
    NonFinitePredictionError,
    NoPosesError,
    ShapeMismatchError,
    TopK,
)
from posegrad.testing import assert_matches_autograd, rules
from tests.device import seeded
from tests.models import BATCHED_ONLY, FEATURES, MODELS
from tests.schedules import SCHEDULES

SIZES = [3, 1, 4, 2]


def _shuffled(sizes: list[int], seed: int) -> Tensor:
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return ids[torch.randperm(len(ids), generator=seeded(seed))]


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [*zip(sorted(set(MODELS) - BATCHED_ONLY), cycle([1, 4]), strict=False)],
)
def test_every_model_matches_autograd_group_by_group(name: str, chunk_size: int) -> None:
    poses = torch.randn(sum(SIZES), FEATURES)
    assert_matches_autograd(MODELS[name](), poses, Min(2.0), groups=SIZES, chunk_size=chunk_size)


@given(
    rule=rules(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    shuffled=st.booleans(),
    chunk_size=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_drawn_groups_match_autograd(
    rule: Combination, sizes: list[int], shuffled: bool, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
    poses = torch.randn(sum(sizes), FEATURES)
    groups = _shuffled(sizes, seed) if shuffled else sizes
    tolerance = 1e-10 * max(1, 1e-4 * 1000 * 10)
    assert_matches_autograd(
        model, poses, rule, groups=groups, chunk_size=chunk_size, tolerance=tolerance
    )


def test_a_rule_that_is_trained_sees_one_group_at_a_time() -> None:
    model, poses = nn.Linear(FEATURES, 3), torch.randn(sum(SIZES), FEATURES)
    for batch in (poses, list(poses)):
        assert_matches_autograd(model, batch, AttentionPooling(3), groups=SIZES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", [Mean(), Min(1.0), Min(1000.0)])
def test_a_call_for_eight_compounds_equals_eight_calls(rule: Combination, schedule: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    engine, poses = Engine(model), torch.randn(8, 16, FEATURES, dtype=torch.float64)
    targets = torch.randn(8, dtype=torch.float64)

    together, per_pose = engine.combine(
        list(poses.flatten(0, 1)), rule, groups=[16] * 8, schedule=schedule
    )
    (together - targets).square().mean().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    for i, group in enumerate(poses):
        alone, own = engine.combine(list(group), rule, schedule=schedule)
        torch.testing.assert_close(alone, together[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, per_pose[16 * i : 16 * i + 16], rtol=1e-12, atol=1e-12)
        ((alone - targets[i]).square() / 8).backward()

    for p, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_of_poses_and_groups_does_not_matter(schedule: str) -> None:
    model, poses = nn.Linear(FEATURES, 1).double(), torch.randn(10, FEATURES, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    order, renamed = torch.randperm(10), torch.tensor([2, 0, 3, 1])
    engine = Engine(model)

    def gradient(batch: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        prediction, _ = engine.combine(list(batch), Min(1.5), groups=groups, schedule=schedule)
        prediction.square().sum().backward()
        return prediction.detach(), model.weight.grad.clone()

    expected, found = gradient(poses, ids), gradient(poses[order], renamed[ids[order]])
    torch.testing.assert_close(found[0][renamed], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-11, atol=1e-11)


def test_one_pose_for_each_group_is_the_model() -> None:
    model, poses = nn.Linear(FEATURES, 1), torch.randn(5, FEATURES)
    prediction, per_pose = Engine(model).combine(poses, Min(), groups=[1] * 5)
    assert torch.equal(prediction, per_pose)


def test_skipping_looks_at_each_group_by_itself() -> None:
    """A group whose loss hardly counts keeps its best pose."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    poses = torch.tensor([[1.0], [9.0], [1.0], [9.0]])
    prediction, _ = Engine(model).combine(list(poses), Min(1.0), groups=[2, 2], skip_below=0.1)
    (prediction * torch.tensor([1.0, 1e-6])).sum().backward()
    weight = torch.softmax(-poses[:2, 0], 0)[0]
    torch.testing.assert_close(
        model.weight.grad, (weight * (1 + 1e-6)).reshape(1, 1), rtol=1e-7, atol=0
    )


def test_evaluation_takes_groups_too() -> None:
    model, poses = nn.Linear(FEATURES, 1), torch.randn(10, FEATURES)
    with torch.no_grad():
        prediction, _ = Engine(model).combine(poses, Mean(), groups=SIZES)
    assert not prediction.requires_grad
    expected = torch.stack([part.mean() for part in model(poses).squeeze(1).split(SIZES)])
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([3, 0, 7], NoPosesError, r"without poses: 1\."),
        (torch.tensor([0] * 5 + [3] * 5), NoPosesError, r"without poses: 1, 2\."),
        (torch.tensor([0] * 9 + [3 * 10**7]), NoPosesError, r": 1, 2, 3, 4, 5 and 29999994 more\."),
        ([], NoPosesError, "there are no groups"),
        (torch.tensor([-1] + [0] * 9), NoPosesError, "below 0"),
        ([5, 6], ShapeMismatchError, "assigns 11 poses to 2 groups, and there are 10 poses"),
        ([5.5, 4.5], ShapeMismatchError, "whole numbers"),
        (10, ShapeMismatchError, "groups is 10, but .* as a list"),
        (["a", "b"], ShapeMismatchError, r"groups is \['a', 'b'\], but .* whole"),
        (torch.zeros(10), ShapeMismatchError, "number of each pose's group"),
    ],
)
def test_groups_that_fit_nothing_are_refused(
    groups: object, error: type[Exception], message: str
) -> None:
    model = nn.Linear(FEATURES, 1)
    with pytest.raises(error, match=message):
        Engine(model).combine(torch.randn(10, FEATURES), Mean(), groups=groups)  # type: ignore[arg-type]
    assert model.weight.grad is None


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [9, 11])
def test_a_generator_of_too_few_or_too_many_poses_is_refused(schedule: str, count: int) -> None:
    poses = (torch.randn(FEATURES) for _ in range(count))
    with pytest.raises(ShapeMismatchError, match=f"there are {count} poses"):
        Engine(nn.Linear(FEATURES, 1)).combine(poses, Mean(), groups=SIZES, schedule=schedule)


def test_a_rule_that_does_not_separate_cannot_stream_groups_either() -> None:
    with pytest.raises(ValueError, match="TopK cannot stream"):
        Engine(nn.Linear(2, 1)).combine(
            torch.randn(4, 2), TopK(1), groups=[2, 2], schedule="stream"
        )


def test_a_nan_in_one_group_names_the_pose() -> None:
    poses = torch.randn(4, 2)
    poses[2] = torch.nan
    with pytest.raises(NonFinitePredictionError, match="poses 2"):
        Engine(nn.Linear(2, 1)).combine(poses, Mean(), groups=[2, 2])


def test_the_plan_knows_of_groups() -> None:
    engine, poses = Engine(nn.Linear(2, 1)), list(torch.randn(6, 2))
    assert engine.plan(poses, Mean(), groups=[2, 4]).schedule == "recompute"
    streamed = engine.plan(poses, Mean(), groups=[2, 4], schedule="stream")
    assert streamed.holds == "2 running sums"
