"""Law 6, memory: peak live bytes beyond the inputs do not grow with the number of poses."""

import pytest
import torch
from torch import nn

from posegrad import Boltzmann, Combination, Engine, Mean, Min
from posegrad.testing import peak_live_bytes
from tests.schedules import SCHEDULES

WIDTH = 64
PARAMETER_BYTES = 4 * (WIDTH * WIDTH + WIDTH) * 4 + 4 * (WIDTH + 1)


def _peak(m: int, rule: Combination, schedule: str) -> int:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1), nn.Flatten(0))
    batch = list(torch.randn(m, 32, WIDTH).unbind())  # 32 atoms of one pose, summed below
    engine = Engine(model, predict=lambda model, pose: model(pose).sum())
    engine.combine(batch[:2], rule, schedule=schedule)  # the first group is looked at closer
    with peak_live_bytes() as peak:
        engine.combine(batch, rule, schedule=schedule).prediction.square().backward()
    return peak.bytes


@pytest.mark.parametrize(
    ("rule", "schedule"),
    [
        (Mean(), "stream"),
        (Min(1.7), "stream"),
        (Boltzmann(0.593), "stream"),
        (Mean(), "recompute"),
        (Min(1000.0), "recompute"),
        (Boltzmann(0.593), "recompute"),
    ],
)
def test_peak_memory_does_not_grow_with_the_poses(rule: Combination, schedule: str) -> None:
    _peak(4, rule, schedule)  # first use of an operator may allocate its own
    peaks = [_peak(m, rule, schedule) for m in (4, 16, 64)]
    # A sharp rule may keep one pose in one group and two in another: one or two gradients at once.
    assert max(peaks) <= 1.1 * max(peaks[1], _peak(16, Mean(), schedule))


def test_store_grows_by_one_gradient_per_pose() -> None:
    few, many = _peak(16, Mean(), "store"), _peak(64, Mean(), "store")
    assert many - few == pytest.approx(48 * PARAMETER_BYTES, rel=0.05)


def test_retain_grows_by_one_graph_per_pose() -> None:
    few, many = _peak(16, Mean(), "retain"), _peak(64, Mean(), "retain")
    graph = 4 * 32 * WIDTH * 4  # the output of every tanh; a linear layer saves its input
    assert many - few >= 48 * graph


def test_stream_is_far_below_retain() -> None:
    assert _peak(64, Mean(), "stream") < 0.3 * _peak(64, Mean(), "retain")


@pytest.mark.parametrize("rule", [Mean(), Min(1000.0)], ids=["stream", "recompute"])
def test_ten_thousand_poses_in_one_call_take_the_memory_of_a_hundred(rule: Combination) -> None:
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.Linear(256, 1))
    engine = Engine(model, chunk_size=50)
    engine.combine(torch.randn(100, 64), rule).prediction.backward()  # which is looked at closer

    def peak(m: int) -> int:
        poses = torch.randn(m, 64)
        with peak_live_bytes() as measured:
            engine.combine(poses, rule).prediction.square().backward()
        model.zero_grad()
        return measured.bytes

    assert peak(10_000) <= 1.1 * peak(100)


def test_nothing_is_kept_after_backward() -> None:
    model = nn.Linear(WIDTH, 1)
    batch = list(torch.randn(20, WIDTH))
    engine = Engine(model)
    for schedule in SCHEDULES:
        model.weight.grad = model.bias.grad = None
        with peak_live_bytes() as peak:
            prediction, _ = engine.combine(batch, Mean(), schedule=schedule)
            prediction.backward()
        kept = 4 * (WIDTH + 1) + 4 * 21  # .grad, and the two results that are still in hand
        assert peak.live <= kept + 200, schedule
