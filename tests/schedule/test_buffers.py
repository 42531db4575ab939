"""Buffers of any size: a replay finds the values its chunk found, the model is left its own."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Combination, Engine, Mean, Min, ReplayError
from tests.models import FEATURES

SIZES = [8, 8192, 8193, 20_000]
WAYS = ["data", "in place", "replaced"]


class Codebook(nn.Module):
    """Scores by a buffer and moves it, from the k-th forward on; two modules may share it."""

    calls: Tensor

    def __init__(self, size: int, way: str = "data", start: int = 0, *, shared: bool = False):
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        self.way, self.start = way, start
        self.register_buffer("calls", torch.tensor(0))
        codes = torch.linspace(0.5, 1.5, size)
        self.holders = nn.ModuleList(nn.Module() for _ in range(2))
        for holder in self.holders:
            holder.register_buffer("codes", codes if shared else codes.clone())

    def forward(self, pose: Tensor) -> Tensor:
        first, second = (holder.codes for holder in self.holders)
        # A product would save what `.data` overwrites: plain autograd does not notice either.
        score = self.linear(pose) * (first[-1] * second[0])
        if int(self.calls) >= self.start:
            self._move(score.detach().mean())
        self.calls = self.calls + 1
        return score

    @torch.no_grad()
    def _move(self, by: Tensor) -> None:
        for holder in self.holders:
            moved = 0.9 * holder.codes + by
            if self.way == "data":
                holder.codes.data.copy_(moved)
            elif self.way == "in place":
                holder.codes.copy_(moved)
            else:
                holder.codes = moved


def _plainly(model: nn.Module, poses: Tensor, rule: Combination, chunk_size: int) -> None:
    predictions = torch.cat([model(chunk)[:, 0] for chunk in poses.split(chunk_size)])
    rule(predictions).square().backward()


def _assert_same(model: nn.Module, plain: nn.Module) -> None:
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def _check(model: nn.Module, rule: Combination, chunk_size: int, poses: Tensor) -> None:
    plain = copy.deepcopy(model)
    _plainly(plain, poses, rule, chunk_size)
    prediction, _ = Engine(model, chunk_size=chunk_size).combine(poses, rule, schedule="recompute")
    prediction.square().backward()
    _assert_same(model, plain)


@pytest.mark.parametrize("size", SIZES)
def test_batch_statistics_move_once(size: int) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, size), nn.BatchNorm1d(size), nn.Linear(size, 1))
    poses = torch.randn(6, FEATURES, dtype=torch.float64)
    _check(model.double(), Min(2.0), 2, poses)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_code_book_written_through_data_is_replayed(size: int, training: bool) -> None:
    model = Codebook(size).double().train(training)
    _check(model, Mean(), 1, torch.randn(5, FEATURES, dtype=torch.float64))


@given(
    size=st.sampled_from(SIZES),
    way=st.sampled_from(WAYS),
    start=st.integers(0, 5),
    training=st.booleans(),
    shared=st.booleans(),
    chunk_size=st.integers(1, 3),
    scale=st.sampled_from([1.0, 1000.0]),
    seed=st.integers(0, 2**20),
)
def test_drawn_buffers_are_replayed_or_named(
    size: int,
    way: str,
    start: int,
    training: bool,
    shared: bool,
    chunk_size: int,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Codebook(size, way, start, shared=shared).double().train(training)
    poses = torch.randn(6, FEATURES, dtype=torch.float64)
    chunks = -(-6 // chunk_size)
    if way == "data" and not training and 0 < start < chunks:
        with pytest.raises(ReplayError, match=r"Buffer\(s\) codes.* without a new version"):
            Engine(model, chunk_size=chunk_size).combine(poses, Min(scale), schedule="recompute")
        return
    _check(model, Min(scale), chunk_size, poses)


@pytest.mark.parametrize("schedule", ["stream", "store", "retain"])
def test_schedules_that_replay_nothing_take_late_writers(schedule: str) -> None:
    model, poses = Codebook(8193, start=2).double().eval(), torch.randn(5, FEATURES).double()
    plain = copy.deepcopy(model)
    _plainly(plain, poses, Mean(), 1)
    Engine(model).combine(list(poses), Mean(), schedule=schedule).prediction.square().backward()
    _assert_same(model, plain)


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_written_through_data_after_combine_is_replayed_and_left(training: bool) -> None:
    model = Codebook(8193, start=100).double().train(training)
    poses = torch.randn(5, FEATURES, dtype=torch.float64)
    plain = copy.deepcopy(model)
    _plainly(plain, poses, Mean(), 1)
    prediction, _ = Engine(model).combine(list(poses), Mean(), schedule="recompute")
    codes = model.holders[0].codes
    for module in (model, plain):
        module.holders[0].codes.data.fill_(3.0)
    prediction.square().backward()
    _assert_same(model, plain)
    assert model.holders[0].codes is codes


class Odd(nn.Module):
    """Holds buffers that torch cannot compare as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)
        matrix = torch.eye(3)
        self.register_buffer("nan", torch.full((3,), torch.nan))
        self.register_buffer("sparse", matrix.to_sparse())
        self.register_buffer("columns", matrix.to_sparse_csc())
        self.register_buffer("rows", matrix.to_sparse_csr())
        self.register_buffer("nested", torch.nested.as_nested_tensor([torch.ones(2)]))
        self.register_buffer("elsewhere", torch.empty(3, device="meta"))

    def forward(self, pose: Tensor) -> Tensor:
        score = self.linear(pose) * (self.sparse @ torch.ones(3, 1)).sum()
        self.sparse._values().add_(1)
        return score


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_buffers_of_every_layout_are_compared(training: bool) -> None:
    torch.manual_seed(0)
    model, plain = Odd().train(training), Odd()
    plain.linear.load_state_dict(model.linear.state_dict())
    poses = torch.randn(4, FEATURES)
    _plainly(plain, poses, Mean(), 1)
    Engine(model).combine(list(poses), Mean(), schedule="recompute").prediction.square().backward()
    torch.testing.assert_close(model.linear.weight.grad, plain.linear.weight.grad)
    assert torch.equal(model.sparse.to_dense(), plain.sparse.to_dense())


class Peculiar(nn.Module):
    """Scores by a buffer that is no tensor of its own, or not yet, or not only a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.count = kind, 0
        self.linear = nn.Linear(FEATURES, 1, dtype=torch.float64)
        self.register_buffer(
            "state", None if kind == "late" else torch.zeros(2, dtype=torch.float64)
        )
        self.register_buffer("first", self.state[:1] if kind == "a view" else None)
        self.elsewhere = [self.state]

    @torch.no_grad()
    def _moved(self) -> Tensor:
        """What the score is multiplied by."""
        self.count += 1
        if self.kind == "late":
            self.state = (
                torch.zeros(2, dtype=torch.float64) if self.state is None else self.state + 0.5
            )
        elif self.kind == "held twice":
            self.elsewhere[0].add_(0.5)
            return torch.zeros(2, dtype=torch.float64)
        elif self.kind == "a view":
            self.state.add_(0.5)
            return self.first
        elif self.count > 6:
            self.state.add_(0.5)
            return torch.zeros(2, dtype=torch.float64)
        return self.state

    def forward(self, pose: Tensor) -> Tensor:
        return self.linear(pose) * (1 + self._moved()[0])


@pytest.mark.parametrize("kind", ["late", "a view", "held twice", "moved in replays only"])
@pytest.mark.parametrize("schedule", ["recompute", "store", "stream"])
def test_a_buffer_of_an_odd_kind_is_restored_and_left_as_it_was(kind: str, schedule: str) -> None:
    model = Peculiar(kind)
    plain = copy.deepcopy(model)
    if kind == "a view":
        plain.first = plain.state[:1]
    poses = torch.randn(6, FEATURES, dtype=torch.float64)

    Engine(model).combine(list(poses), Mean(), schedule=schedule).prediction.square().backward()

    _plainly(plain, poses, Mean(), 1)
    _assert_same(model, plain)
    assert model.first is None or model.first.data_ptr() == model.state.data_ptr()
