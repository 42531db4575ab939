"""The Gramian of more rows than fit, tile by tile."""

import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from posegrad import Engine, MissingExtraError, NoPosesError, ReplayError
from posegrad.schedule._tiles import _tiles
from posegrad.testing import peak_live_bytes

F64 = torch.float64
N, OTHERS = 41, 23


def _network(width: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, width)).double()


def _poses(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _generated(X: Tensor) -> Iterator[Tensor]:
    yield from X


# name: how the poses are handed over, and how the engine runs them
FORMS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "batch": (lambda X: X, {}),
    "chunks": (lambda X: X, {"chunk_size": 3}),
    "list": (list, {}),
    "list, joined": (list, {"collate": torch.stack, "chunk_size": 4}),
    "generator": (_generated, {}),
    "dataset": (TensorDataset, {"predict": lambda model, pose: model(pose[0])}),
}


@pytest.mark.parametrize(
    ("name", "memory", "width"),
    [
        *((name, 40_000, 1 + number % 2) for number, name in enumerate(FORMS)),
        *(("chunks", memory, 2) for memory in (1, 2**30)),
        *(("generator", memory, 1) for memory in (1, 2**30)),
    ],
)
def test_tiles_make_the_gramian(name: str, memory: int, width: int) -> None:
    """Of one pose, of some, of all."""
    hand, options = FORMS[name]
    rows, columns = (N, OTHERS) if memory > 1 else (7, 4)
    model, X, Y = _network(width), _poses(rows, 1), _poses(columns, 2)
    engine = Engine(model, memory=memory, **options)
    J, K = (Engine(model).gather(batch) for batch in (X, Y))
    torch.testing.assert_close(engine.gramian(hand(X)), J.gramian())
    torch.testing.assert_close(engine.gramian(hand(X), hand(Y)), J @ K.T)


def test_numbers_of_others_follow() -> None:
    model, X, Y = _network(), _poses(N, 1), _poses(OTHERS, 2)
    targets = torch.randn(N + OTHERS, dtype=F64)

    def loss(predictions: Tensor, i: Tensor) -> Tensor:
        return (predictions - targets[i]).square()

    engine = Engine(model, memory=40_000)
    both = engine.gather(torch.cat([X, Y]), loss=loss).gramian()
    torch.testing.assert_close(engine.gramian(X, Y, loss=loss), both[:N, N:])
    torch.testing.assert_close(engine.gramian(X, loss=loss), both[:N, :N])


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_tile_has_a_block_of_the_last(rows: int, columns: int | None) -> None:
    tiles = list(_tiles(rows, columns))
    wanted = {(i, j) for i in range(rows) for j in range(columns or rows) if columns or j >= i}
    assert sorted(tiles) == sorted(wanted)
    for (row, column), (next_row, next_column) in pairwise(tiles):
        shared = {row, column} & {next_row, next_column} if columns is None else ()
        assert shared or row == next_row or column == next_column


def test_two_blocks_are_held_and_the_result() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    block = 2**16
    engine, X = Engine(model, memory=8 * block, chunk_size=16), torch.randn(512, 64)
    engine.gramian(X[:64])
    with peak_live_bytes() as peak:
        found = engine.gramian(X)
    whole = engine.gather(X).held_bytes
    size = found.numel() * found.element_size()
    assert whole > 4 * block
    assert peak.bytes < size + 4 * block


@pytest.mark.parametrize("name", FORMS)
def test_projected_rows_are_those_of_the_jacobian(name: str) -> None:
    hand, options = FORMS[name]
    model, X = _network(2), _poses(N, 1)
    expected = Engine(model).gather(X).project(9, seed=4)
    found = Engine(model, **options).project(hand(X), 9, seed=4)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="k is 0"):
        Engine(model).project(X, 0)


def test_projections_hold_one_chunk() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    engine, X = Engine(model, chunk_size=8), torch.randn(256, 64)
    engine.project(X[:16], 4)
    with peak_live_bytes() as few:
        engine.project(X[:32], 4)
    with peak_live_bytes() as many:
        engine.project(X, 4)
    assert many.bytes < few.bytes + 256 * 4 * 4 * 3


def test_what_has_no_rows_is_refused() -> None:
    engine = Engine(_network())
    with pytest.raises(NoPosesError, match="no rows to multiply"):
        engine.gramian([])
    with pytest.raises(NoPosesError, match="no rows to multiply"):
        engine.gramian(_poses(3, 0), [])


def test_tiles_of_a_network_with_dropout_are_of_one_network() -> None:
    net = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 1)).double()
    poses = torch.randn(60, 6, dtype=F64)
    before = torch.get_rng_state()
    G = Engine(net, memory=20_000).gramian(poses)
    assert float(torch.linalg.eigvalsh(G)[0]) > -1e-9  # rows of 60 networks, each drawn once
    torch.testing.assert_close(G, G.T)
    assert not torch.equal(torch.get_rng_state(), before)


def test_blocks_end_where_stated_chunks_do() -> None:
    net = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 1)).double()
    poses = torch.randn(60, 6, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = Engine(net, chunk_size=4).gather(poses).gramian()
        for memory in (24_000, 40_000):
            net[1].reset_running_stats()
            G = Engine(net, chunk_size=4, memory=memory).gramian(poses)
            torch.testing.assert_close(G, expected)
            assert int(net[1].num_batches_tracked) == 15


def test_poses_that_change_when_they_are_fetched_are_refused() -> None:
    class Augmented:
        def __len__(self) -> int:
            return 60

        def __getitem__(self, number: int) -> Tensor:
            return torch.from_numpy(np.random.standard_normal(6))

    with pytest.raises(ReplayError, match=r"other predictions.*for another tile"):
        Engine(nn.Linear(6, 1).double(), memory=4_000).gramian(Augmented())


@pytest.mark.parametrize("others", [None, OTHERS, 3])
@pytest.mark.parametrize("memory", [1, 40_000, 2**30])
def test_what_is_planned_is_gathered(memory: int, others: int | None) -> None:
    model, X = _network(), _poses(N, 1)
    Y = None if others is None else _poses(others, 2)
    engine, scored = Engine(model, memory=memory, check="never", chunk_size=2), [0]
    plan = engine.plan_gramian(X, Y)
    model.register_forward_hook(lambda _, x, y: scored.__setitem__(0, scored[0] + len(y)))
    G = engine.gramian(X, Y)
    looked = 16 * sum(count > 16 for count in (N, others or 0))
    assert scored[0] == plan.scored + looked
    assert plan.bytes_made == G.numel() * G.element_size()
    first = str(plan).splitlines()[0]
    assert first.startswith(f"poses    {N} in {plan.blocks} block")
    assert (f"others   {others} in" in str(plan)) == (others is not None)


def test_what_two_blocks_hold_is_planned() -> None:
    model = _network()
    plan = Engine(model, memory=40_000, chunk_size=4).plan_gramian(_poses(N, 1))
    held = Engine(model).gather(_poses(plan.largest, 1)).held_bytes
    assert plan.bytes_held == pytest.approx(2 * held, rel=0.1)
    assert plan.blocks == 2
    with pytest.raises(NoPosesError, match="no rows to multiply"):
        Engine(model).plan_gramian([])


def test_planning_draws_no_random_number() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Linear(7, 1))
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        Engine(net.double(), chunk_size=4).plan_gramian(_poses(N, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert int(net[2].num_batches_tracked) == 0


def test_a_bar_counts_the_gathers(capsys: pytest.CaptureFixture[str]) -> None:
    engine, X = Engine(_network(), memory=40_000), _poses(N, 1)
    gathers = engine.plan_gramian(X).gathers
    engine.gramian(X, progress=True)
    assert f"{gathers}/{gathers}" in capsys.readouterr().err


def test_a_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'posegrad\[progress\]'"):
        Engine(_network()).gramian(_poses(N, 1), progress=True)
