"""Law 6, work: forwards and backwards are what the table of schedules says."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Best, Boltzmann, Combination, Engine, Mean, Min, TopK
from tests.device import seeded
from tests.models import FEATURES
from tests.reference import rows, trainable


class _Tally(torch.autograd.Function):
    """Identity that counts the backwards that pass through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counter[str]) -> Tensor:
        ctx.counts = counts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.counts["backwards"] += 1
        return cotangent, None


class Tallied(nn.Module):
    """Scores a pose by its distance from theta, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))
        self.counts: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counts["with graph" if torch.is_grad_enabled() else "without graph"] += 1
        return _Tally.apply(x - self.theta, self.counts)


DESCENDING = torch.linspace(0, -31, 32)  # each pose is better than all before it
SHUFFLED = DESCENDING[torch.randperm(32, generator=seeded(1))]


def _work(
    batch: Tensor, rule: Combination, schedule: str, *, chunk_size: int = 1, skip_below: float = 0.0
) -> dict[str, int]:
    model = Tallied()
    engine = Engine(model, chunk_size=chunk_size)
    first = engine.combine(batch[:4], Best(), schedule="recompute")  # which is checked throughout
    first.prediction.backward()
    model.counts.clear()
    result = engine.combine(batch, rule, schedule=schedule, skip_below=skip_below)
    result.prediction.backward()
    return dict(model.counts)


def test_retain_runs_each_pose_once() -> None:
    assert _work(SHUFFLED, Min(), "retain") == {"with graph": 32, "backwards": 32}


def test_store_differentiates_each_pose_once() -> None:
    assert _work(SHUFFLED, Min(), "store") == {"with graph": 32, "backwards": 32}


@pytest.mark.parametrize("rule", [Mean(), Boltzmann(10.0)])
def test_stream_differentiates_each_pose_of_a_soft_rule_once(rule: Combination) -> None:
    assert _work(SHUFFLED, rule, "stream") == {"with graph": 32, "backwards": 32}


def test_stream_differentiates_running_bests_of_a_sharp_rule_only() -> None:
    values = SHUFFLED.tolist()
    bests = sum(value < min(values[:i], default=1.0) for i, value in enumerate(values))
    assert bests < 32
    assert _work(SHUFFLED, Min(), "stream") == {"with graph": 32, "backwards": bests}


@pytest.mark.parametrize(("rule", "kept"), [(Min(), 1), (Best(), 1), (TopK(5), 5), (Mean(), 32)])
def test_recompute_replays_the_poses_that_carry_weight(rule: Combination, kept: int) -> None:
    # The first pose of the first pass is scored with its graph, to see what predictions depend on.
    expected = {"without graph": 31, "with graph": 1 + kept, "backwards": kept}
    assert _work(DESCENDING, rule, "recompute") == expected


@pytest.mark.parametrize(("rule", "kept"), [(Min(), 1), (TopK(5), 2), (Mean(), 8)])
def test_recompute_replays_the_chunks_that_carry_weight(rule: Combination, kept: int) -> None:
    counts = _work(SHUFFLED, rule, "recompute", chunk_size=4)
    assert counts == {"without graph": 7, "with graph": 1 + kept, "backwards": kept}


def test_boltzmann_streams_chunks_with_one_backward_per_sum() -> None:
    counts = _work(SHUFFLED, Boltzmann(10.0), "stream", chunk_size=4)
    assert counts["with graph"] == 8
    assert 8 <= counts["backwards"] <= 16


@pytest.mark.parametrize(("rule", "schedule"), [(Mean(), "stream"), (Min(), "recompute")])
def test_auto_picks(rule: Combination, schedule: str) -> None:
    assert _work(SHUFFLED, rule, "auto") == _work(SHUFFLED, rule, schedule)


def test_auto_retains_a_single_chunk() -> None:
    assert _work(SHUFFLED, Min(), "auto", chunk_size=32) == {"with graph": 1, "backwards": 1}


def test_skip_below_leaves_out_light_poses() -> None:
    # Weights of Min(1) fall by e per pose: those above 1e-3 of the best are the best seven.
    counts = _work(SHUFFLED, Min(1.0), "auto", skip_below=1e-3)
    assert counts == {"without graph": 31, "with graph": 8, "backwards": 7}


def test_no_grad_costs_the_forwards_alone() -> None:
    model = Tallied()
    with torch.no_grad():
        prediction, per_pose = Engine(model).combine(list(SHUFFLED), Mean())
    assert dict(model.counts) == {"without graph": 32}
    assert not prediction.requires_grad
    assert not per_pose.requires_grad


def test_a_loss_that_ignores_the_result_costs_no_backward() -> None:
    model = Tallied()
    prediction, _ = Engine(model).combine(list(SHUFFLED), Min(), schedule="recompute")
    assert dict(model.counts) == {"with graph": 32}  # an engine's first group
    (0 * prediction).backward()
    assert model.counts["backwards"] == 0


def test_every_gradient_left_out_is_bounded() -> None:
    x = torch.linspace(0, 8, 9)
    model = nn.Linear(1, 1).double()
    engine = Engine(model)
    batch = x.double()[:, None]

    def gradient(skip_below: float) -> Tensor:
        model.zero_grad()
        engine.combine(list(batch), Min(1.0), skip_below=skip_below, schedule="recompute")[
            0
        ].backward()
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    weights = Min(1.0).weights(model(batch).detach().squeeze())
    for share in (1e-4, 1e-2, 0.3):
        light = weights < share * weights.max()
        bound = share * weights.max() * batch[light].abs().sum()
        assert (gradient(share) - gradient(0.0)).abs() <= bound + 1e-14


@pytest.mark.parametrize("silent", [False, True], ids=["every group", "one without gradient"])
def test_the_jacobian_of_groups_replays_each_pose_once(silent: bool) -> None:
    """Of all parameters together, by as many replays as one backward takes."""
    sizes, scored = [2, 5, 1, 4], []
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        scored.append(pose)
        return model(pose).sum()

    engine = Engine(model, predict=predict)
    poses = torch.randn(sum(sizes), FEATURES, dtype=torch.float64)

    def losses() -> Tensor:
        found = engine.combine(list(poses), Min(2.0), groups=sizes, schedule="recompute").prediction
        factors = torch.tensor([1.0, 0.0, 2.0, 3.0] if silent else [1.0, 4.0, 2.0, 3.0])
        return found.square() * factors

    expected = rows(losses(), trainable(model))
    engine.jacobian(losses())  # the first is compared with a backward
    output = losses()
    scored.clear()
    J = engine.jacobian(output)
    assert len(scored) == sum(sizes) - (sizes[1] if silent else 0)
    torch.testing.assert_close(J.matrix(), expected, rtol=1e-12, atol=1e-12)
