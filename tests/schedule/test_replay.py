"""Replay: a pose scored again in backward is scored as it was before."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Engine, Mean, Min, ReplayError, UntrackedTensorError
from posegrad.testing import assert_matches_autograd
from tests.device import DEVICE
from tests.models import FEATURES, MODELS


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_dropout_is_replayed_after_other_draws() -> None:
    model, batch = MODELS["dropout"]().double(), torch.randn(6, FEATURES, dtype=torch.float64)
    torch.manual_seed(1)
    Min(1.0)(torch.stack([model(pose)[0] for pose in batch])).backward()
    expected = _flat(model)

    model.zero_grad()
    torch.manual_seed(1)
    prediction, _ = Engine(model).combine(list(batch), Min(1.0), schedule="recompute")
    torch.rand(100)
    prediction.backward()
    torch.testing.assert_close(_flat(model), expected)


class Forking(nn.Module):
    """Drops out by numbers of its own: afterwards the random state is as before."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MODELS["dropout"]()

    def forward(self, pose: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return self.body(pose)


def test_dropout_that_puts_the_random_state_back_is_replayed() -> None:
    model, batch = Forking().double(), torch.randn(4, FEATURES, dtype=torch.float64)
    torch.manual_seed(1)
    Mean()(torch.stack([model(pose)[0] for pose in batch])).backward()
    expected = _flat(model)

    model.zero_grad()
    torch.manual_seed(1)
    prediction, _ = Engine(model).combine(list(batch), Mean(), schedule="recompute")
    torch.rand(100)
    prediction.backward()
    torch.testing.assert_close(_flat(model), expected)


def test_training_flags_are_replayed() -> None:
    model, batch = MODELS["dropout"]().double(), torch.randn(6, FEATURES, dtype=torch.float64)
    torch.manual_seed(1)
    model(batch)  # the draws of one chunk
    torch.manual_seed(1)
    Mean()(model(batch)[:, 0]).backward()
    expected = _flat(model)

    model.zero_grad()
    torch.manual_seed(1)
    prediction, _ = Engine(model, chunk_size=6).combine(batch, Mean(), schedule="recompute")
    model.eval()
    prediction.backward()
    torch.testing.assert_close(_flat(model), expected)
    assert not any(module.training for module in model.modules())


def test_autocast_is_replayed_outside_its_block() -> None:
    model, batch = MODELS["mlp"](), torch.randn(6, FEATURES)
    dtypes = []
    model[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        prediction, _ = Engine(model).combine(list(batch), Mean(), schedule="recompute")
    prediction.backward()
    assert len(dtypes) == 12
    assert set(dtypes) == {torch.bfloat16}


def test_the_default_device_is_replayed() -> None:
    """A backward knows nothing of it, not even inside its block."""
    model, batch = MODELS["mlp"](), torch.randn(6, FEATURES)
    seen = []

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        seen.append(torch.empty(0).device.type)
        return model(pose).sum()

    with torch.device("meta"):
        prediction, _ = Engine(model, predict=predict).combine(
            list(batch), Mean(), schedule="recompute"
        )
        prediction.backward()
    assert seen == ["meta"] * 12


@pytest.mark.parametrize("name", ["batch norm, training", "counting", "spectral norm"])
def test_buffers_are_updated_once_and_keep_their_identity(name: str) -> None:
    model, batch = MODELS[name](), torch.randn(8, FEATURES)
    buffers = dict(model.named_buffers())
    engine = Engine(model, chunk_size=2)
    prediction, _ = engine.combine(batch, Mean(), schedule="recompute")
    after = {key: value.clone() for key, value in model.named_buffers()}
    prediction.backward()
    for key, value in model.named_buffers():
        assert value is buffers[key]
        assert torch.equal(value, after[key])


def test_buffers_changed_after_combine_do_not_disturb_the_replay() -> None:
    model = MODELS["batch norm, evaluation"]().double()
    batch = torch.randn(6, FEATURES, dtype=torch.float64)
    Mean()(model(batch)[:, 0]).backward()
    expected = _flat(model)

    model.zero_grad()
    prediction, _ = Engine(model).combine(list(batch), Mean(), schedule="recompute")
    model.train()(5 + torch.randn(9, FEATURES, dtype=torch.float64))  # moves running statistics
    moved = model[1].running_mean.clone()
    prediction.backward()
    torch.testing.assert_close(_flat(model), expected)
    assert torch.equal(model[1].running_mean, moved)


class Codebook(nn.Module):
    """Moves a buffer through `.data`, which leaves no new version behind."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.register_buffer("codes", torch.zeros(1))

    def forward(self, pose: Tensor) -> Tensor:
        score = self.linear(pose)
        self.codes.data.add_(score.detach().mean())
        return score * (1 + self.codes)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_buffers_written_through_data_are_replayed(chunk_size: int) -> None:
    assert_matches_autograd(Codebook(), torch.randn(6, FEATURES), Mean(), chunk_size=chunk_size)


class Swapping(nn.Module):
    """Replaces its buffer by a new tensor in every forward; two names share it."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.register_buffer("state", torch.ones(()))

    def forward(self, pose: Tensor) -> Tensor:
        score = self.linear(pose) * self.state
        self.state = 0.5 * self.state + 0.1
        return score


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_buffers_replaced_by_the_model_are_replayed(chunk_size: int) -> None:
    assert_matches_autograd(Swapping(), torch.randn(6, FEATURES), Mean(), chunk_size=chunk_size)


class ForeignNoise(nn.Module):
    """Draws from Python's generator, which no replay can know of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.linear(pose) + random.random()


def test_noise_from_elsewhere_raises() -> None:
    model = ForeignNoise()
    prediction, _ = Engine(model).combine(
        list(torch.randn(3, FEATURES)), Mean(), schedule="recompute"
    )
    with pytest.raises(ReplayError, match=r"pose\(s\) 0 gave .* instead of") as caught:
        prediction.backward()
    assert "schedule='stream'" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


def test_poses_changed_in_place_raise() -> None:
    model, batch = MODELS["mlp"](), [torch.randn(FEATURES) for _ in range(4)]
    prediction, _ = Engine(model).combine(list(batch), Mean(), schedule="recompute")
    batch[2].mul_(2)
    with pytest.raises(ReplayError, match=r"pose\(s\) 2 were modified in place"):
        prediction.backward()
    assert all(p.grad is None for p in model.parameters())


def test_poses_that_turn_out_to_be_coupled_are_replayed_whole() -> None:
    # "centred" subtracts the chunk's mean: the kept poses alone would give other predictions.
    model = MODELS["centred"]().double()
    batch = torch.randn(9, FEATURES, dtype=torch.float64)
    assert_matches_autograd(model, batch, Min(3.0), chunk_size=3, schedules=["recompute"])

    def two_worst(predictions: Tensor) -> Tensor:
        return predictions.topk(2, dim=0).values.sum()

    assert_matches_autograd(model, batch, two_worst, chunk_size=3, schedules=["recompute"])


class Remembering(nn.Module):
    """Encodes the pocket once per group and keeps the result: a common trick, and a trap."""

    def __init__(self) -> None:
        super().__init__()
        self.pocket = nn.Linear(1, FEATURES)
        self.head = nn.Linear(FEATURES, 1)
        self.cache: Tensor | None = None

    def forward(self, pose: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.tanh(self.pocket(torch.ones(1)))
        return self.head(pose * self.cache)


@pytest.mark.parametrize("schedule", ["store", "stream", "recompute"])
def test_a_cache_between_poses_is_refused_not_lost(schedule: str) -> None:
    with pytest.raises(UntrackedTensorError, match="computed before this pose was scored"):
        Engine(Remembering()).combine(
            list(torch.randn(3, FEATURES)), Mean(), schedule=schedule
        ).prediction.backward()


class RememberingEach(Remembering):
    """Keeps one encoding for each kind of pocket, and poses of one group have several."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: dict[bool, Tensor] = {}

    def forward(self, pose: Tensor) -> Tensor:
        kind = bool(pose[0] > 0)
        if kind not in self.caches:
            self.caches[kind] = torch.tanh(self.pocket(torch.full((1,), float(kind))))
        return self.head(pose * self.caches[kind])


@pytest.mark.parametrize("schedule", ["store", "stream", "recompute"])
def test_a_cache_that_fills_later_is_refused_too(schedule: str) -> None:
    poses = torch.tensor([[1.0], [-1.0], [-2.0], [-3.0]]).expand(4, FEATURES)
    with pytest.raises(UntrackedTensorError, match="computed before this pose was scored"):
        Engine(RememberingEach()).combine(list(poses), Min(), schedule=schedule)


def test_a_cache_between_poses_works_with_retain() -> None:
    model = Remembering()
    Engine(model).combine(list(torch.randn(3, FEATURES)), Mean(), schedule="retain")[0].backward()
    assert model.pocket.weight.grad is not None


def test_a_replay_under_another_random_generator_state_is_bitwise() -> None:
    seen: dict[bool, list[Any]] = {True: [], False: []}
    model = MODELS["dropout"]()
    model[1].register_forward_hook(
        lambda module, args, out: seen[torch.is_grad_enabled()].append((out == 0).tolist())
    )
    engine, batch = Engine(model), list(torch.randn(4, FEATURES))
    engine.combine(batch, Mean(), schedule="recompute")
    seen[True].clear()
    prediction, _ = engine.combine(batch, Mean(), schedule="recompute")
    first_pass = seen[True] + seen[False]
    assert len(first_pass) == 4
    seen[True].clear()
    torch.manual_seed(99)
    prediction.backward()
    assert seen[True] == first_pass
