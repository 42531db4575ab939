"""Only poses that count are scored again, where it is known that poses stay apart."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from posegrad import Best, Budget, Combination, Engine, Min, PosesMixError, TopK
from posegrad.testing import assert_matches_autograd
from tests.models import FEATURES, Gated
from tests.schedule.test_budget import AtomSum, _join


def _mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), *middle, nn.Tanh(), nn.Linear(5, 1))


class Tally:
    """Calls a model, and writes down how many poses it was given with a graph in each step."""

    def __init__(self, count: Callable[[Any], int] = len) -> None:
        self.count = count
        self.again: list[int] = []

    def __call__(self, model: nn.Module, poses: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.again.append(self.count(poses))
        return model(poses)


def _scored_again(
    model: nn.Module, poses: Any, rule: Combination, tally: Tally, **options: Any
) -> list[int]:
    """How many poses were in each forward of the backward, in the third step."""
    engine = Engine(model, predict=tally, **options)
    for _ in range(2):
        engine.combine(poses, rule, schedule="recompute").prediction.backward()
    prediction, _ = engine.combine(poses, rule, schedule="recompute")
    tally.again.clear()
    prediction.backward()
    return tally.again


def test_one_pose_of_a_batch() -> None:
    assert _scored_again(_mlp(), torch.randn(40, FEATURES), Best(), Tally()) == [1]


def test_few_poses_of_stated_chunks() -> None:
    poses = torch.randn(40, FEATURES)
    assert _scored_again(_mlp(), poses, TopK(4), Tally(), chunk_size=8) == [4]


@pytest.mark.parametrize("kind", ["slices", "joined", "mapping"])
def test_poses_of_several_chunks_are_scored_again_in_chunks_as_large(kind: str) -> None:
    batch = torch.randn(40, FEATURES)
    batch[::5] += 10 * torch.randn(8, FEATURES)
    poses: Any = {"slices": batch, "joined": list(batch), "mapping": {"x": batch}}[kind]
    collate = torch.stack if kind == "joined" else None
    tally = Tally(lambda own: len(own["x"] if kind == "mapping" else own))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = _mlp()

        def forward(self, own: Any) -> Tensor:
            return self.mlp(own["x"] if kind == "mapping" else own)

    again = _scored_again(Model(), poses, TopK(8), tally, chunk_size=5, collate=collate)
    assert sum(again) == 8
    assert max(again) <= 5
    assert len(again) <= 3


def test_the_best_of_each_compound_in_chunks_of_atoms() -> None:
    sizes = [5, 3, 4, 12, 2, 2, 7, 1, 6, 4, 4]
    poses = [torch.randn(size, 3) for size in sizes]
    tally = Tally(lambda joined: joined[2])
    engine = Engine(AtomSum(), predict=tally, collate=_join, chunk_size=Budget(16, len))
    for _ in range(2):
        found = engine.combine(poses, Best(), groups=[4, 4, 3], schedule="recompute")
        found.prediction.sum().backward()
    found = engine.combine(poses, Best(), groups=[4, 4, 3], schedule="recompute")
    tally.again.clear()
    found.prediction.sum().backward()
    assert sum(tally.again) == 3
    assert len(tally.again) < 3


def test_graphs_of_pyg() -> None:
    def predict(model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(batch.num_graphs)
        atoms = model(batch.x).squeeze(1)
        return atoms.new_zeros(batch.num_graphs).index_add(0, batch.batch, atoms)

    seen: list[int] = []
    graphs = [Data(x=torch.randn(k, FEATURES)) for k in (3, 5, 2, 4, 6, 3)]
    for poses in (Batch.from_data_list(graphs), graphs):
        engine = Engine(_mlp(), predict=predict, chunk_size=3)
        for _ in range(3):
            found = engine.combine(poses, Best(), schedule="recompute")
            seen.clear()
            found.prediction.backward()
        assert seen == [1]


class Padded(nn.Module):
    """Has no mask: the length that poses were padded to leaks, behind a gate or openly."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(dim=(1, 2)) + self.gate * x.shape[1]


def _padded(poses: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(poses, batch_first=True)


def test_poses_of_chunks_of_one_length_each_are_not_padded_together() -> None:
    """Only those of one length are joined: of padded ones nothing has been compared."""
    model = Padded(0.0).double()
    poses = [torch.randn(2 + i // 3, 3, dtype=torch.float64) for i in range(12)]
    engine = Engine(model, collate=_padded, chunk_size=3)
    for _ in range(3):
        model.zero_grad()
        engine.combine(
            poses, Best(), groups=[6, 6], schedule="recompute"
        ).prediction.sum().backward()
    best = torch.cat([model(_padded(poses[i : i + 3])) for i in range(0, 12, 3)])
    rows = torch.stack([best[:6].min(), best[6:].min()])
    expected = torch.autograd.grad(rows.sum(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


RAGGED = [4, 4, 4, 4, 4, 4, 2, 5, 3, 4, 5, 5]


@pytest.mark.parametrize("gate", [0.0, 1e-3, 1.0])
def test_padding_that_leaks_is_noticed_after_chunks_of_one_length(gate: float) -> None:
    """Chunks of one length tell nothing of those whose poses are padded."""
    model = Padded(gate).double()
    poses = [torch.randn(atoms, 3, dtype=torch.float64) for atoms in RAGGED]
    for best in (1, 6):  # of a chunk of one length, then of a padded one
        poses[best] = poses[best] - 10 * model.linear.weight.detach()
        for _ in range(3):
            engine = Engine(model, collate=_padded, chunk_size=3)
            for first in (poses[:6], poses):
                model.zero_grad()
                engine.combine(first, Best(), schedule="recompute").prediction.backward()
        rows = torch.cat([model(_padded(poses[i : i + 3])) for i in range(0, 12, 3)])
        expected = torch.autograd.grad(rows.min(), list(model.parameters()))
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
        poses[best] = poses[best] + 20 * model.linear.weight.detach()


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_padding_that_leaks_is_mixing_where_chunks_are_not_stated(gate: float) -> None:
    poses = [torch.randn(atoms, 3) for atoms in RAGGED]
    engine = Engine(Padded(gate), collate=_padded)
    for _ in range(2):
        engine.combine(poses[:6], Best()).prediction.backward()
    with pytest.raises(PosesMixError, match="together with it"):
        engine.combine(poses, Best())


def test_light_poses_that_are_walked() -> None:
    assert _scored_again(_mlp(), list(torch.randn(40, FEATURES)), Best(), Tally()) == [FEATURES]


class Shared(nn.Module):
    """One random mask for all poses of a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * torch.rand(x.shape[1:]).to(x))


class Counting(nn.Module):
    """Writes to a buffer that its predictions depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.linear(x) * (1 + self.seen.to(x))


class Own(nn.Module):
    """Draws from a generator that it puts back itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.linear(x + torch.randn(x.shape).to(x))


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "batch statistics": lambda: _mlp(nn.BatchNorm1d(5)),
    "a gate that is zero": Gated,
    "a mask for all": Shared,
    "dropout": lambda: _mlp(nn.Dropout(0.3)),
    "a counter": Counting,
    "a generator of its own": Own,
}


@pytest.mark.parametrize("name", WHOLE)
def test_chunks_come_back_whole_where_poses_are_not_known_to_stay_apart(name: str) -> None:
    poses = torch.randn(12, FEATURES)
    again = _scored_again(WHOLE[name](), poses, Best(), Tally(), chunk_size=4)
    assert again[-1] == 4  # the last forward is that of the whole chunk


def _cases() -> Iterator[Any]:
    for name, make in {"mlp": _mlp, **WHOLE}.items():
        for rule in (Best(), TopK(3), Min(1000.0)):
            for chunk_size in (1, 3, 5):
                yield pytest.param(make, rule, chunk_size, id=f"{name} {rule} {chunk_size}")


@pytest.mark.parametrize(("make", "rule", "chunk_size"), [*_cases()])
def test_all_of_them_match_autograd(
    make: Callable[[], nn.Module], rule: Combination, chunk_size: int
) -> None:
    model = make()
    if chunk_size == 1 and isinstance(model, nn.Sequential) and len(model) == 4:
        model = model.eval()  # batch statistics of one pose are none
    # A loss of the combined prediction alone: most poses carry no weight.
    assert_matches_autograd(
        model,
        torch.randn(11, FEATURES)[: 11 - 11 % chunk_size],
        rule,
        chunk_size=chunk_size,
        schedules=["recompute", "auto"],
        loss=lambda prediction, _: prediction.sin(),
        tolerance=1e-9,
    )


def test_pose_tensors_of_slices_get_their_gradients() -> None:
    poses = torch.randn(12, FEATURES, requires_grad=True)
    for chunk_size in ("auto", 4):
        assert_matches_autograd(
            _mlp(),
            poses,
            Best(),
            chunk_size=chunk_size,
            loss=lambda prediction, _: prediction.sin(),
        )
