"""`memory=`: what graphs may take. Measured, kept to, and shrunk where memory runs out."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from posegrad import Best, Boltzmann, Combination, Engine, Mean, Min, TopK
from posegrad.schedule._memory import checked_memory
from posegrad.testing import peak_live_bytes
from tests.models import FEATURES, MODELS

RULES = [Mean(), Min(2.0), Min(1000.0), Boltzmann(0.593), Best(), TopK(3)]


class Seen:
    """Calls a model with poses, and writes down how many they were each time."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, model: nn.Module, poses: Tensor) -> Tensor:
        self.counts.append(len(poses))
        return model(poses).flatten(1).sum(dim=1)


def _mlp(depth: int, width: int) -> nn.Module:
    inside = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*inside, nn.Linear(width, 1))


def _step(engine: Engine, poses: Any, rule: Combination) -> None:
    engine.combine(poses, rule).prediction.square().backward()


def _peak(step: Callable[[], object]) -> int:
    with peak_live_bytes() as peak:
        step()
    return peak.bytes


def _one_chunk(model: nn.Module, poses: Tensor) -> int:
    """What plain autograd takes at most for a chunk, its saved tensors and gradients included."""
    return _peak(lambda: Seen()(model, poses).sum().backward())


@given(
    depth=st.integers(1, 4),
    width=st.integers(4, 48),
    atoms=st.integers(1, 16),
    m=st.integers(1, 60),
    budget=st.integers(2**12, 2**18),
    rule=st.sampled_from(RULES),
    joined=st.booleans(),
)
def test_the_peak_is_that_of_the_budget(
    depth: int, width: int, atoms: int, m: int, budget: int, rule: Combination, joined: bool
) -> None:
    model, seen = _mlp(depth, width), Seen()
    batch = torch.randn(m, atoms, width)
    poses: Any = list(batch) if joined else batch
    options: dict[str, Any] = {"collate": torch.stack} if joined else {}
    engine = Engine(model, predict=seen, memory=budget, **options)
    for _ in range(3):  # measured, and measured again in chunks that are larger
        _step(engine, poses, rule)
        model.zero_grad()
    seen.counts.clear()
    found = _peak(lambda: _step(engine, poses, rule))
    largest = max(seen.counts)
    model.zero_grad()
    chunk = _one_chunk(model, batch[:largest])
    graph = 4 * largest * atoms * width * depth  # what every tanh saves
    assert largest == 1 or graph <= budget
    parameters = sum(4 * p.numel() for p in model.parameters())
    inputs = 4 * largest * atoms * width * (2 if joined else 1)
    # Rows of `store` and running sums; predictions, weights and random state are the rest.
    assert found <= chunk + budget + 4 * parameters + inputs + 64 * m + 2**15


@pytest.mark.parametrize("rule", [Mean(), Best()])
def test_chunks_are_alike_from_the_second_call_on(rule: Combination) -> None:
    seen = Seen()
    engine = Engine(_mlp(2, 16), predict=seen, memory="16KiB")
    poses, counts = torch.randn(100, 4, 16), []
    for _ in range(5):
        seen.counts.clear()
        _step(engine, poses, rule)
        counts.append([*seen.counts])
    assert counts[0][0] == 1  # which is measured
    assert counts[-1] == counts[-2] == counts[-3]
    assert max(counts[-1]) > 1


def test_larger_poses_are_measured_anew() -> None:
    seen = Seen()
    engine = Engine(_mlp(2, 16), predict=seen, memory="8KiB")
    largest = []
    for atoms in (2, 2, 2, 8, 8, 2):
        seen.counts.clear()
        _step(engine, torch.randn(64, atoms, 16), Mean())
        largest.append(max(seen.counts))
    assert largest[1] > largest[3]
    assert 3 <= largest[1] / largest[4] <= 5
    assert largest[5] == largest[2]


def test_a_batch_of_graphs_is_divided_by_their_sizes() -> None:
    seen: list[int] = []

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch.num_nodes)
        atoms = model(batch.x).squeeze(1)
        return atoms.new_zeros(batch.num_graphs).index_add(0, batch.batch, atoms)

    graphs = [Data(x=torch.randn(k, 16)) for k in (5, 40, 5, 5, 30, 10, 5, 20, 5, 5)]
    engine = Engine(_mlp(2, 16), predict=predict, memory="16KiB")
    for _ in range(3):
        seen.clear()
        _step(engine, Batch.from_data_list(graphs), Mean())
    assert len(seen) > 1
    assert 4 * 16 * 2 * max(seen) <= 2**14
    assert all(4 * 16 * 2 * (a + b) > 2**13 for a, b in pairwise(seen))


def test_poses_without_tensors_are_scored_one_by_one() -> None:
    seen: list[int] = []
    table = {"CC": 0, "CCO": 1}

    def predict(model: nn.Module, numbers: Tensor) -> Tensor:
        seen.append(len(numbers))
        return model(numbers).squeeze(1)

    def collate(names: list[str]) -> Tensor:
        return torch.tensor([table[name] for name in names])

    engine = Engine(nn.Embedding(2, 1), predict=predict, collate=collate)
    for _ in range(2):
        _step(engine, ["CC", "CCO", "CC"], Mean())
    assert seen == [1] * 6


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("10kB", 10_000), ("7b", 7), (12, 12)],
)
def test_memory_is_a_number_or_a_text(stated: Any, expected: int) -> None:
    assert checked_memory(stated, []) == expected


@pytest.mark.parametrize("stated", [0, -1, True, None, 2.5, "much", "2 GiBs", "GiB"])
def test_memory_that_says_nothing_is_refused(stated: Any) -> None:
    with pytest.raises(ValueError, match=r"memory is .*, but it must be a number of bytes from 1"):
        Engine(nn.Linear(2, 1), memory=stated)


def test_on_a_cpu_memory_is_a_gibibyte() -> None:
    assert checked_memory("auto", [nn.Linear(2, 1)]) == 2**30


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("walks", [False, True])
def test_small_budgets_give_the_same_numbers(rule: Combination, walks: bool) -> None:
    batch = torch.randn(40, FEATURES, dtype=torch.float64)
    poses: Any = list(batch) if walks else batch
    options: dict[str, Any] = {"collate": torch.stack} if walks else {}
    found = []
    for memory in (2**9, 2**12, 2**14, 2**30):
        torch.manual_seed(0)
        model = MODELS["mlp"]().double()
        engine = Engine(model, memory=memory, **options)
        for _ in range(3):
            model.zero_grad()
            _step(engine, poses, rule)
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


class Narrow(nn.Module):
    """Takes few poses at once, draws random numbers, and counts what it was given."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.linear = nn.Linear(FEATURES, 1)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        noisy = self.dropout(x) if self.training else x
        if len(x) > self.most:
            raise torch.OutOfMemoryError("there is no more")
        return self.linear(noisy)


@pytest.mark.parametrize("schedule", ["auto", "stream", "store", "recompute"])
@pytest.mark.parametrize("walks", [False, True])
def test_chunks_are_halved_where_memory_runs_out(schedule: str, walks: bool) -> None:
    model = Narrow(3).double().eval()
    batch = torch.randn(16, FEATURES, dtype=torch.float64)
    rule = Boltzmann(1.0)
    (expected,) = torch.autograd.grad(rule(model.linear(batch).squeeze(1)), model.linear.weight)
    poses: Any = list(batch) if walks else batch
    engine = Engine(model, collate=torch.stack if walks else None)

    def step() -> None:
        model.zero_grad()
        engine.combine(poses, rule, schedule=schedule).prediction.backward()
        torch.testing.assert_close(model.linear.weight.grad, expected)

    with pytest.warns(UserWarning, match="poses ran out of memory together"):
        step()
    step()
    step()
    assert model.seen == 3 * 16


@pytest.mark.parametrize("rule", [Mean(), Min(1000.0), Boltzmann(1.0)])
def test_without_gradients_chunks_are_halved_too(rule: Combination) -> None:
    """And no schedule that differentiates is taken."""
    model, poses = Narrow(3).eval(), torch.randn(16, FEATURES)
    graphs: list[bool] = []

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return model(x)

    engine = Engine(model, predict=predict)
    with torch.no_grad():
        expected = model.linear(poses).squeeze(1)
        with pytest.warns(UserWarning, match="poses ran out of memory together"):
            found = engine.combine(poses, rule)
    assert not any(graphs)
    assert not found.per_pose.requires_grad
    torch.testing.assert_close(found.per_pose, expected)


@pytest.mark.filterwarnings("ignore:[0-9]+ poses ran out of memory together")
@pytest.mark.parametrize("differentiates", [False, True])
@pytest.mark.parametrize("rule", [Mean(), Min(1000.0), Boltzmann(1.0)])
def test_no_pose_is_lost_that_is_too_large_by_itself(
    rule: Combination, differentiates: bool
) -> None:
    """Its neighbours' halves wait when it fails, and must not pass for the whole group."""
    model, poses = nn.Linear(FEATURES, 1), torch.randn(8, FEATURES)
    poses[2] = 100

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        if bool((x == 100).any()):
            raise torch.OutOfMemoryError("this one is too large")
        return model(x)

    with (
        torch.set_grad_enabled(differentiates),
        pytest.raises(torch.OutOfMemoryError, match="this one is too large"),
    ):
        Engine(model, predict=predict).combine(poses, rule)


def test_what_an_attempt_drew_and_wrote_is_undone() -> None:
    results = []
    for most in (2, 4):
        model = Narrow(most)
        batch = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        engine = Engine(model) if most == 2 else Engine(model, chunk_size=2)
        warned = pytest.warns(UserWarning, match="4 poses ran") if most == 2 else nullcontext()
        with warned:
            prediction, _ = engine.combine(batch, Mean(), schedule="recompute")
        prediction.backward()
        results.append((torch.get_rng_state(), model.seen.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_one_pose_that_does_not_fit_is_the_models_own_error() -> None:
    with (
        pytest.warns(UserWarning, match="ran out of memory together"),
        pytest.raises(torch.OutOfMemoryError, match="there is no more"),
    ):
        Engine(Narrow(0)).combine(torch.randn(4, FEATURES), Mean())


def test_stated_chunks_are_not_halved() -> None:
    engine = Engine(Narrow(3), chunk_size=4)
    with pytest.raises(torch.OutOfMemoryError, match="there is no more"):
        engine.combine(torch.randn(8, FEATURES), Mean())
