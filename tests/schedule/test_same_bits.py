"""A replay on a CPU gives the bits of the first pass, or raises; elsewhere a group's digits."""

import random
from itertools import chain, repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Engine, Mean, Min, ReplayError
from posegrad.schedule.recompute import _rounded
from tests.models import BATCHED_ONLY, FEATURES, MODELS


class Noisy(nn.Module):
    """Scores of one size, times a number that no replay can draw again."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.scale = scale

    def forward(self, pose: Tensor) -> Tensor:
        return self.scale * self.linear(pose) * (1 + random.random())


def _second_group(model: nn.Module, poses: Tensor, **options: int) -> Tensor:
    """The prediction of an engine that has seen a group, and so scores without graphs."""
    engine = Engine(model, **options)
    engine.combine(poses, Mean(), schedule="recompute")
    return engine.combine(poses, Mean(), schedule="recompute").prediction


@given(
    exponent=st.integers(-20, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    chunk_size=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_noise_is_seen_however_small_predictions_are(
    exponent: int, dtype: torch.dtype, chunk_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    model = Noisy(10.0**exponent).to(dtype)
    prediction = _second_group(model, torch.randn(4, FEATURES).to(dtype), chunk_size=chunk_size)
    with pytest.raises(ReplayError, match="instead of"):
        prediction.backward()
    assert all(p.grad is None for p in model.parameters())


def test_noise_in_a_small_prediction_beside_a_large_one_is_seen() -> None:
    model = Noisy(1.0)
    with torch.no_grad():
        model.linear.bias.zero_()
    poses = torch.randn(3, FEATURES) * 1e-6

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        return model(pose) if pose[0] < 1 else pose.sum()

    prediction, _ = Engine(model, predict=predict).combine(
        [*poses, torch.full((FEATURES,), 1e3)], Mean(), schedule="recompute"
    )
    with pytest.raises(ReplayError, match="instead of"):
        prediction.backward()


def test_a_last_bit_is_seen() -> None:
    after = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    scores = chain([1.0] * 3, repeat(after))
    model = nn.Linear(FEATURES, 1)

    def predict(model: nn.Module, pose: Tensor) -> Tensor:
        return model(pose) * 0 + next(scores)

    engine = Engine(model, predict=predict)
    prediction, _ = engine.combine(list(torch.randn(3, FEATURES)), Mean(), schedule="recompute")
    with pytest.raises(ReplayError, match="instead of"):
        prediction.backward()


class Cells(nn.Module):
    """An LSTM without a module for it: oneDNN's kernel for no_grad differs in the last bits."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.LSTM(1, 16).parameters())

    def forward(self, pose: Tensor) -> Tensor:
        steps = pose.reshape(-1, FEATURES, 1)
        start = (steps.new_zeros(1, len(steps), 16),) * 2
        weights = list(self.weights)
        out, *_ = torch.lstm(steps, start, weights, True, 1, 0.0, self.training, False, True)
        return out[:, -1].sum(-1).reshape(*pose.shape[:-1], 1)


class Memory(nn.Module):
    """An LSTM over the numbers of a pose."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 16, 2, batch_first=True, bidirectional=True)

    def forward(self, pose: Tensor) -> Tensor:
        out, _ = self.lstm(pose.reshape(-1, FEATURES, 1))
        return out[:, -1].sum(-1).reshape(*pose.shape[:-1], 1)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("model", [Cells, Memory])
def test_kernels_that_depend_on_a_graph_are_no_other_forward(
    model: type[nn.Module], chunk_size: int
) -> None:
    network, poses = model(), torch.randn(8, FEATURES)
    Mean()(network(poses)[:, 0]).backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    _second_group(network, poses, chunk_size=chunk_size).backward()
    for p, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_replays_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    model, poses = MODELS[name]().to(dtype), torch.randn(8, FEATURES).to(dtype)
    chunk_size = 4 if name in BATCHED_ONLY else 2
    seen: list[Tensor] = []
    engine = Engine(model, chunk_size=chunk_size)
    engine.combine(poses, Min(), schedule="recompute")
    _, per_pose = engine.combine(poses, Min(), schedule="recompute")
    model.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    per_pose.sum().backward()
    assert torch.equal(torch.cat(seen).reshape(per_pose.shape), per_pose)


@given(exponent=st.integers(-30, 30), off=st.sampled_from([1e-7, 1e-3]))
def test_elsewhere_rounding_is_that_of_the_whole_group(exponent: int, off: float) -> None:
    scale = 10.0**exponent
    expected = torch.tensor([1.0, 1e-7, 0.0]) * scale
    sizes = expected.new_full((3,), scale)
    assert _rounded(expected + off * sizes, expected, sizes) == (off == 1e-7)
