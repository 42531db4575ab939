"""Calls that once were wrong in silence, or failed, as an engine had learned something before."""

import functools

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from posegrad import Engine, Mean, ReplayError, TopK
from tests.models import FEATURES


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_light_poses_that_are_walked_are_scored_without_gradients_after_training() -> None:
    model, poses = _mlp(), [*_drawn(40, FEATURES)]
    engine = Engine(model)
    for _ in range(3):
        engine.combine(poses, Mean()).prediction.backward()
        engine.combine(poses, TopK(3)).prediction.backward()
        engine.embed(poses).sum().backward()
    with torch.no_grad():
        expected = torch.cat([model(pose) for pose in poses])
        for found in (
            engine.combine(poses, Mean()).per_pose,
            engine.combine(poses, TopK(3)).per_pose,
            engine.embed(poses),
        ):
            torch.testing.assert_close(found, expected)


class _Selective(nn.Module):
    """Its rows cannot be read: a selective checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        contexts = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts,
            [torch.ops.aten.addmm.default],
        )
        hidden = torch.utils.checkpoint.checkpoint(
            lambda q: self.first(q).tanh(), x, use_reentrant=False, context_fn=contexts
        )
        return self.last(hidden).squeeze(-1).mean(1)


def test_no_pose_of_a_generator_is_lost_where_rows_cannot_be_read() -> None:
    model, poses = _Selective(), _drawn(60, 20, 3)
    engine = Engine(model, collate=torch.stack, memory="4GiB")
    for _ in range(4):
        found = engine.combine((pose for pose in poses), lambda p: (p * p).mean() ** 0.5)
        assert len(found.per_pose) == 60
        found.prediction.backward()


class _Replacing(nn.Module):
    """Puts another buffer in a buffer's place, and runs out of memory with more than four poses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        scores = self.linear(x).squeeze(-1) * self.count
        if len(x) > 4:
            raise torch.OutOfMemoryError("simulated")
        return scores


@pytest.mark.filterwarnings("ignore:.*memory:UserWarning")
def test_a_buffer_that_is_replaced_is_put_back_when_a_chunk_runs_out_of_memory() -> None:
    model, poses = _Replacing(), torch.randn(8, 3)
    found = Engine(model).combine(poses, Mean())
    assert model.count.item() == 3
    factors = (found.per_pose / model.linear(poses).squeeze(-1)).round().tolist()
    assert factors == [2.0] * 4 + [3.0] * 4


@pytest.mark.parametrize("largest", [3.0, 1e4])
def test_one_large_prediction_hides_no_other_forward_of_a_pose(largest: float) -> None:
    numbers = np.random.default_rng(0)
    model = nn.Linear(FEATURES, 1)

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        kept = torch.from_numpy(numbers.random(FEATURES) > 0.5).to(pose) if model.training else 1.0
        return model(pose * kept)

    engine = Engine(model, predict=predict)
    poses = [torch.randn(FEATURES) for _ in range(12)]
    poses[0] = poses[0] * largest
    for training in (False, False, True):
        model.train(training)
        prediction, _ = engine.combine(poses, TopK(3), schedule="recompute")
        if training:
            with pytest.raises(ReplayError, match="Scored again in backward"):
                prediction.backward()
        else:
            prediction.backward()


class _Gated(nn.Module):
    """Poses meet through a gate that is closed at first, and may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(3, 1).double(), nn.Parameter(torch.zeros(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) + (self.gate * (x - x.mean(0)).square()).sum(1)


def test_what_is_trained_tells_kinds_of_poses_apart() -> None:
    model, poses = _Gated(), _drawn(12, 3)
    engine = Engine(model, chunk_size=6)
    for gate_is_trained in (False, True):
        model.gate.requires_grad_(gate_is_trained)
        model.linear.bias.requires_grad_(not gate_is_trained)
        model.zero_grad()
        engine.combine(poses, TopK(2)).prediction.backward()
    found = model.gate.grad
    model.zero_grad()
    TopK(2)(torch.cat([model(chunk) for chunk in poses.split(6)])).backward()
    torch.testing.assert_close(found, model.gate.grad)


def test_poses_that_meet_in_chunks_of_more_than_two_are_not_scored_by_themselves() -> None:
    class Meeting(_Gated):
        def forward(self, x: Tensor) -> Tensor:
            own = (x - x.mean(0)).square() if len(x) > 2 else x
            return self.linear(x).squeeze(1) + (self.gate * own).sum(1)

    model, poses = Meeting(), _drawn(12, 3)
    engine = Engine(model, chunk_size=6)
    for _ in range(3):
        model.zero_grad()
        engine.combine(poses, TopK(2)).prediction.backward()
        found = model.gate.grad.clone()
        model.zero_grad()
        TopK(2)(torch.cat([model(chunk) for chunk in poses.split(6)])).backward()
        torch.testing.assert_close(found, model.gate.grad)
