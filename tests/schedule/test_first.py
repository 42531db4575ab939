"""The first call of an engine, which looks at the graph of every pose."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posegrad import Best, Boltzmann, Combination, Engine, Mean, Min, TopK, UntrackedTensorError
from posegrad.testing import peak_live_bytes
from tests.models import FEATURES
from tests.schedule.test_work import DESCENDING, SHUFFLED, Tallied

WIDTH = 32


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


@pytest.mark.parametrize(("rule", "kept"), [(Min(), 1), (Best(), 1), (TopK(5), 5)])
def test_recompute_scores_each_pose_with_its_graph_and_those_again_that_count(
    rule: Combination, kept: int
) -> None:
    model = Tallied()
    Engine(model).combine(list(DESCENDING), rule).prediction.backward()
    assert dict(model.counts) == {"with graph": 32 + kept, "backwards": kept}


@pytest.mark.parametrize("rule", [Mean(), Min(0.1)])
def test_stream_scores_and_differentiates_each_pose_once(rule: Combination) -> None:
    model = Tallied()
    Engine(model).combine(list(SHUFFLED), rule).prediction.backward()
    assert dict(model.counts) == {"with graph": 32, "backwards": 32}


class Alive(torch.autograd.Function):
    """Identity that tells how many graphs of poses are alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: list[int]) -> Tensor:
        ctx.token = _Token(graphs)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent, None


class _Token:
    """Counted while it is there: how many are, and how many were at once."""

    def __init__(self, graphs: list[int]) -> None:
        self.graphs = graphs
        graphs[0] += 1
        graphs[1] = max(graphs)

    def __del__(self) -> None:
        self.graphs[0] -= 1


@pytest.mark.parametrize("rule", [Mean(), Min(), Best()])
def test_light_poses_share_a_chunk_once_the_first_is_measured(rule: Combination) -> None:
    graphs = [0, 0]
    engine = Engine(_mlp(), predict=lambda model, x: Alive.apply(model(x), graphs))
    engine.combine(list(torch.randn(2000, FEATURES)), rule).prediction.backward()
    assert 16 < graphs[1] < 1000
    assert graphs[0] == 0


@pytest.mark.parametrize("rule", [Mean(), Min(), Boltzmann(0.593)])
@pytest.mark.parametrize("walks", [False, True])
def test_its_peak_is_memory_and_the_temporaries_of_a_chunk(rule: Combination, walks: bool) -> None:
    width, atoms, m, budget = 32, 16, 64, 2**17
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    batch = torch.randn(m, atoms, width)
    largest = 0

    def predict(model: nn.Module, poses: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(poses) if poses.ndim == 3 else 1)
        return model(poses).flatten(-2).sum(dim=-1)

    engine = Engine(model, predict=predict, memory=budget)
    poses = list(batch) if walks else batch
    with peak_live_bytes() as peak:
        engine.combine(poses, rule).prediction.square().backward()
    model.zero_grad()
    with peak_live_bytes() as chunk:
        predict(model, batch[:largest]).sum().backward()
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert peak.bytes <= budget + chunk.bytes + 4 * parameters + 64 * m + 2**15


class Pockets(nn.Module):
    """Keeps one encoding for each pocket, of which a pose names the number."""

    def __init__(self) -> None:
        super().__init__()
        self.pocket, self.head = nn.Linear(1, FEATURES), nn.Linear(FEATURES, 1)
        self.kept: dict[int, Tensor] = {}

    def forward(self, pose: tuple[int, Tensor]) -> Tensor:
        number, x = pose
        if number not in self.kept:
            self.kept[number] = torch.tanh(self.pocket(torch.full((1,), float(number))))
        return self.head(x * self.kept[number])


@pytest.mark.parametrize("schedule", ["store", "stream", "recompute"])
@pytest.mark.parametrize("again", [1, 39, 199])
def test_a_cache_is_refused_whichever_pose_finds_it(schedule: str, again: int) -> None:
    """However many poses before it were alike, and though all may share one chunk."""
    numbers = [*range(again), again - 1, *range(again, 200)]
    poses = [(number, torch.randn(FEATURES)) for number in numbers]
    with pytest.raises(UntrackedTensorError, match="computed before this pose was scored") as error:
        Engine(Pockets()).combine(poses, Min(), schedule=schedule)
    assert error.value


@pytest.mark.parametrize("schedule", ["stream", "recompute"])
def test_computed_poses_that_share_a_chunk_have_their_gradients(schedule: str) -> None:
    encoder, head = nn.Linear(3, FEATURES).double(), _mlp().double()
    x = torch.randn(50, 3, dtype=torch.float64)
    parameters = [*encoder.parameters(), *head.parameters()]
    expected = torch.autograd.grad(Min(0.5)(head(encoder(x))[:, 0]), parameters)
    pocket = encoder(x[0])  # one tensor in all poses
    poses = [pocket if i == 0 else encoder(row) for i, row in enumerate(x)]
    found = Engine(head).combine(poses, Min(0.5), schedule=schedule).prediction
    torch.testing.assert_close(torch.autograd.grad(found, parameters), expected)
