"""Rows that are picked and added up by number: whose they are is read off the numbers alone.

A wrong owner would give a wrong gradient without a word, so nothing here relies on the comparison
with a plain backward that an engine makes: every law holds with `check="never"`, and with
`check="always"` no engine finds anything to complain of.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GATConv, GCNConv, GraphNorm, SAGEConv

from posegrad import Engine, ListeningError, StaleFactorError
from posegrad.graph import _inference, _trial
from posegrad.jacobian import Layout
from tests.drawing import double
from tests.jacobian.apart_table import APART, OWNER, SHARED, Parts, block, graph, total
from tests.jacobian.indexed_table import (
    ADDS,
    BATCHES,
    LAYERS,
    OUTPUTS,
    PICKS,
    Batch,
    D,
    Network,
    Spelling,
    batch,
    numbers,
    wide,
)
from tests.jacobian.moves_table import MOVES, OPERATORS, Leaves
from tests.reference import gramian, product, rows, trainable


@dataclass
class Sentence:
    """A drawn network, and batches that an engine sees one after the other."""

    layers: list[Spelling]
    pooled: str
    output: str
    batches: list[tuple[list[int], float, bool]]
    seed: int = 0

    def assert_exact(self) -> None:
        torch.manual_seed(self.seed)
        network = Network(self.layers, self.pooled).double()
        engines = _engines(network)
        for sizes, share, loops in self.batches:
            predictions = network(batch(sizes, share=share, loops=loops))
            output = OUTPUTS[self.output](predictions)
            _assert_exact(engines, network, output if output.numel() else predictions)


def _engines(model: nn.Module) -> list[Engine]:
    return [Engine(model, check=check) for check in ("never", "always")]


def _assert_exact(engines: list[Engine], model: nn.Module, output: Tensor, **options: Any) -> None:
    """Rows, products and norms, with one relative precision for all parameters."""
    parameters = trainable(model)
    expected, w = rows(output, parameters), torch.randn_like(output)
    combined = torch.cat([g.flatten() for g in product(w, expected, parameters).values()])
    for engine in engines:
        J = engine.jacobian(output, retain_graph=True, **options)
        _assert_equal(J.matrix(), expected)
        _assert_equal(J.gramian(), gramian(expected, output.shape))
        _assert_equal(J.norms(), expected.norm(dim=1).reshape(output.shape))
        _assert_equal(torch.cat([g.flatten() for g in J.combine(w).values()]), combined)


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    atol = 1e-10 * max(1e-3, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


SPELLINGS = st.builds(
    Spelling,
    *(st.sampled_from(sorted(table)) for table in (PICKS, PICKS, ADDS, LAYERS)),
    st.booleans(),
)
SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=5)
SENTENCES = st.builds(
    Sentence,
    layers=st.lists(SPELLINGS, min_size=1, max_size=3),
    pooled=st.sampled_from(sorted(ADDS)),
    output=st.sampled_from(sorted(OUTPUTS)),
    batches=st.lists(
        st.tuples(SIZES, st.sampled_from([0.0, 0.4, 1.0]), st.booleans()), min_size=1, max_size=3
    ),
    seed=st.integers(0, 2**16),
)


@given(SENTENCES)
def test_any_message_passing_agrees_with_autograd(sentence: Sentence) -> None:
    sentence.assert_exact()


@pytest.mark.parametrize("pick", PICKS)
def test_every_way_to_pick(pick: str) -> None:
    layer = Spelling(pick, pick, "index_add", "linear", False)
    Sentence([layer], "index_add", "one number", BATCHES).assert_exact()


@pytest.mark.parametrize("add", ADDS)
def test_every_way_to_add(add: str) -> None:
    layer = Spelling("brackets", "index_select", add, "linear", True)
    Sentence([layer], add, "one number", BATCHES).assert_exact()


@pytest.mark.parametrize("owner", [OWNER, torch.arange(7).flip(0)])
@pytest.mark.parametrize("pick", PICKS)
def test_parameters_picked_by_number(pick: str, owner: Tensor) -> None:
    """Of a parameter's own rows any pose may have any, alone or with others."""
    model = Parts()
    drawn = PICKS[pick](model.table, numbers(3, 7)) + PICKS[pick](model.table.tanh(), OWNER)
    output = total(owner, model.energy(drawn * model.rows(7)), int(owner.max()) + 1)
    _assert_exact(_engines(model), model, output)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", APART)
def test_poses_that_stay_apart(name: str) -> None:
    _assert_exact_twice(APART[name])


@pytest.mark.parametrize("name", SHARED)
def test_poses_that_meet(name: str) -> None:
    """Their rows are exact too, by slower ways."""
    with pytest.warns(UserWarning, match="predictions of different poses depend on each other"):
        _assert_exact_twice(SHARED[name])


def _assert_exact_twice(network: Callable[[Parts], Tensor]) -> None:
    model = Parts()
    engines = _engines(model)
    for _ in range(2):  # the second follows what the first has found
        _assert_exact(engines, model, network(model))


@contextmanager
def _meeting(allowed: bool) -> Iterator[None]:
    """Poses may be said to depend on each other, or no warning at all may be given."""
    with warnings.catch_warnings():
        if allowed:
            warnings.filterwarnings("ignore", "The predictions of different poses depend")
            warnings.filterwarnings("ignore", "Gradients are nan or infinite")
        yield


class Chain(nn.Module):
    """Moves with a layer in front of each."""

    def __init__(self, moves: list[str]) -> None:
        super().__init__()
        self.moves = moves
        self.layers = nn.ModuleList(nn.LazyLinear(3) for _ in moves)
        self.norm = nn.LayerNorm(3, eps=0.1)

    def forward(self, x: Tensor, owner: Tensor, count: int) -> Tensor:
        for move, layer in zip(self.moves, self.layers, strict=True):
            x, owner = MOVES[move](self.norm(torch.tanh(layer(x))), owner)
        return total(owner, torch.tanh(x).square().sum((0, 2)), count)


@given(
    moves=st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=6),
    sizes=st.lists(SIZES, min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_chain_of_moves_agrees_with_autograd(
    moves: list[str], sizes: list[list[int]], seed: int
) -> None:
    _assert_chain(moves, sizes, seed)


@pytest.mark.parametrize("move", MOVES)
def test_every_move(move: str) -> None:
    _assert_chain([move], [[2, 1, 3], [1, 1, 1]], 0)


def _assert_chain(moves: list[str], sizes: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = Chain(moves).double()
    model(double(2, 1, 2), torch.zeros(1).long(), 1)  # the layers learn their widths
    engines = _engines(model)
    for own in sizes:
        owner = batch(own).owner
        _assert_exact(engines, model, model(double(2, len(owner), 2), owner, len(own)))


@given(
    operator=st.sampled_from(sorted(OPERATORS)),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dims=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    count=st.integers(2, 4),
    seed=st.integers(0, 2**16),
)
def test_any_operator_agrees_with_autograd(
    operator: str, shape: list[int], dims: tuple[int, int], count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, (dim, along) = Leaves(), (d % len(shape) for d in dims)
    y = OPERATORS[operator](model, shape, dim)
    owner = numbers(count, y.shape[along])
    each = (y * double(*y.shape)).movedim(along, 0).unsqueeze(-1).flatten(1).sum(1)
    with _meeting(True):  # a row may be picked by several
        _assert_exact(_engines(model), model, total(owner, each, count))


# What numbers may do between calls, and after one.


def _cycle(atoms: int, shift: int, owner: Tensor) -> Batch:
    """One edge for each atom, to the next of its pose."""
    receiver = torch.empty(atoms, dtype=torch.long)
    for pose in owner.unique():
        own = (owner == pose).nonzero()[:, 0]
        receiver[own] = own.roll(shift)
    return Batch(double(atoms, 3), owner, torch.arange(atoms), receiver, 3)


@pytest.mark.parametrize("stated", [False, True])
def test_other_numbers_of_the_same_shape(stated: bool) -> None:
    """Nothing that was found out about one graph's numbers serves the next."""
    model = Parts()
    engines = _engines(model)
    for step in range(6):
        b = _cycle(7, step, OWNER[torch.randperm(7)])
        meeting = step % 3 == 2
        if meeting:
            b = b._replace(receiver=torch.randperm(7))
        index = [b.owner, b.owner[b.sender]] if stated and not meeting else None
        with _meeting(meeting):
            _assert_exact(engines, model, graph(model, b=b), pose_index=index)


def test_numbers_that_return_after_others() -> None:
    """What one graph said holds for the next only if it says it again, in whichever layer."""
    model = Parts()
    engines = _engines(model)
    turn, stay = _cycle(7, 1, OWNER), _cycle(7, 0, OWNER)
    elsewhere = _cycle(7, 1, OWNER.flip(0))
    for first, second in [(turn, turn), (turn, turn), (stay, turn), (turn, stay), (turn, turn)]:
        for b, other in ((first, second), (elsewhere, elsewhere)):
            h = block(model, torch.tanh(model.lift(b.atoms)), b)
            output = total(b.owner, model.energy(block(model, h, other)))
            _assert_exact(engines, model, output)


class Pooled(nn.Module):
    """The sum of each pose's atoms, `[m, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(3, 40), nn.Linear(40, 2)

    def forward(self, atoms: Tensor, owner: Tensor) -> Tensor:
        sums = torch.zeros(3, 40, dtype=atoms.dtype).index_add(0, owner, self.below(atoms).tanh())
        scores: Tensor = self.above(sums)
        return scores


def _refused_listening(engine: Engine, output: Tensor) -> None:
    with pytest.raises(ListeningError, match="2 numbers for each pose"):
        engine.listen(output)


def _failed(engine: Engine, output: Tensor, atoms: Tensor) -> None:
    atoms.add_(0)  # which the first layer saved
    with pytest.raises(StaleFactorError, match="changed in place"):
        engine.jacobian(output)


@pytest.mark.parametrize("cut", ["listening refused", "reading failed"])
def test_numbers_of_a_call_that_failed_serve_no_other(cut: str) -> None:
    """A recipe from other sizes is not compared again, so nothing else would notice."""
    model = Pooled().double()
    engine = Engine(model)
    for owner in (torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 0, 1])):
        engine.jacobian(model(double(4, 3), owner))
    atoms = double(7, 3)
    output = model(atoms, OWNER)
    if cut == "listening refused":
        _refused_listening(engine, output)
    else:
        _failed(engine, output, atoms)
    output = model(double(7, 3), OWNER.flip(0))
    expected = rows(output, trainable(model)).reshape(3, 2, -1)
    torch.testing.assert_close(engine.jacobian(output).matrix().reshape(3, 2, -1), expected)


def test_numbers_of_one_thread_serve_no_other() -> None:
    """Threads meet a structure at once, with other numbers each."""
    model, start = Pooled().double(), Barrier(3)
    engine = Engine(model)
    engine.jacobian(model(double(4, 3), torch.tensor([0, 1, 1, 2])))

    def read(output: Tensor) -> Tensor:
        start.wait()
        return engine.jacobian(output, retain_graph=True).matrix()

    with ThreadPoolExecutor(3) as pool:
        for size in range(200, 230):
            owners = [torch.randint(3, (size,)) for _ in range(3)]
            outputs = [model(double(size, 3), owner) for owner in owners]
            for output, found in zip(outputs, pool.map(read, outputs), strict=True):
                expected = rows(output, trainable(model))
                torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_ragged_batches_leave_no_owners_behind() -> None:
    """Each is of a structure of its own; what is kept for a structure met again is bounded."""
    model, kept = Parts(), []
    engine = Engine(model, check="never")
    for size in range(3, 20):
        engine.jacobian(graph(model, b=batch([size, 2, size + 1])))
        gc.collect()
        kept.append(sum(1 for held in gc.get_objects() if type(held) is Layout and held.size > 8))
    assert kept[-1] <= kept[3]


@pytest.mark.parametrize("pick", ["embedding", "a matrix", "gather, expanded"])
def test_owners_that_are_stated_too(pick: str) -> None:
    """Where numbers tell, and where only the caller does."""
    network = Network([Spelling(pick, "brackets", "segment_reduce", "linear", True)] * 2, "mean")
    engines = _engines(network.double())
    for _ in range(3):
        b = batch([3, 2, 4], share=1.0)
        index = [b.owner, b.owner[b.sender]]
        _assert_exact(engines, network, network(b)[:, 0], pose_index=index)


def test_a_gate_that_opens_later() -> None:
    """Numbers say that poses share atoms; while the gate is shut, no gradient does."""
    model, gate = Parts(), torch.zeros((), dtype=torch.float64)
    engines = _engines(model)
    for step in range(3):
        gate.fill_(step % 2)
        h = model.rows(7)
        output = total(OWNER, model.energy(h + gate * h[torch.randperm(7)]))
        with _meeting(bool(gate)):
            _assert_exact(engines, model, output)


def _indexed_by(name: str, p: Parts, index: Tensor) -> Tensor:
    if name in PICKS:
        return p.energy(PICKS[name](p.rows(4), index))
    return p.energy(ADDS[name](p.rows(4), index, p.rows(4)))


@pytest.mark.parametrize("name", [*PICKS, *ADDS])
def test_numbers_changed_after_the_forward(name: str) -> None:
    """A plain backward refuses where it would be wrong; so do we, or we are right."""
    model, index = Parts(), torch.tensor([2, 0, 3, 1])
    output = _indexed_by(name, model, index)
    expected = rows(output, trainable(model))
    index.copy_(torch.tensor([1, 3, 0, 2]))
    try:
        _assert_equal(rows(output, trainable(model)), expected)
    except RuntimeError:
        for engine in _engines(model):
            with pytest.raises(StaleFactorError, match="changed in place"):
                engine.jacobian(output)
    else:
        _assert_exact(_engines(model), model, output)


@pytest.mark.parametrize("name", [*PICKS, *ADDS])
def test_numbers_changed_after_the_call(name: str) -> None:
    model, index = Parts(), torch.tensor([2, 0, 3, 1])
    output = _indexed_by(name, model, index)
    expected = rows(output, trainable(model))
    J = Engine(model, check="never").jacobian(output)
    index.copy_(torch.tensor([1, 3, 0, 2]))
    _assert_equal(J.matrix(), expected)


def test_stated_owners_changed_after_the_call() -> None:
    model, owner = Parts(), OWNER.clone()
    output = functional.one_hot(owner).double().T @ model.energy(model.rows(7))
    expected = rows(output, trainable(model))
    J = Engine(model, check="never").jacobian(output, pose_index=owner)
    owner.zero_()
    _assert_equal(J.matrix(), expected)


def test_sources_longer_than_the_numbers() -> None:
    """Torch itself has no derivative of these."""
    model = Parts()
    sums = torch.zeros(3, D).double().scatter_add(0, wide(OWNER, model.table), model.rows(9))
    output = model.energy(sums)
    for read in (lambda y: rows(y, trainable(model)), Engine(model, check="never").jacobian):
        with pytest.raises(RuntimeError, match="returned an invalid gradient"):
            read(output)


# What is seen from the numbers alone.


def _no_probe(*arguments: object) -> None:
    raise AssertionError("probed")


SEEN = {
    "index_select and scatter_add": ("index_select", "scatter_add, expanded"),
    "brackets and index_add": ("brackets", "index_add"),
    "gather and index_put": ("gather, written out", "index_put"),
    "PyG": ("index_select", "PyG softmax"),
}


@pytest.mark.parametrize("spelling", SEEN)
def test_ragged_graphs_need_no_probe(monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    pick, add = SEEN[spelling]
    network = Network([Spelling(pick, pick, add, "linear", False)] * 2, add).double()
    monkeypatch.setattr(_trial, "probed", _no_probe)
    for sizes, share, loops in BATCHES:
        output = network(batch(sizes, share=share, loops=loops))[:, 0]
        _assert_exact(_engines(network), network, output)


class Strided(nn.Module):
    """Poses `[m, 3]`, in memory in one order or the other, read from it by strides."""

    def __init__(self, *, flips: bool, strides: tuple[int, int]) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(3, 3), nn.Linear(3, 1)
        self.flips, self.strides = flips, strides

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x).tanh()
        if self.flips:
            h = h.T.contiguous().T
        scores: Tensor = self.above(h.as_strided((3, 3), self.strides)).squeeze(1)
        return scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", [(3, 1), (1, 3), (0, 1), (2, 1)])
@pytest.mark.parametrize("flips", [False, True])
def test_numbers_read_from_memory(
    monkeypatch: pytest.MonkeyPatch, flips: bool, strides: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whether they stay where they are depends on what no graph tells; if so, nothing is probed."""
    network = Strided(flips=flips, strides=strides).to(dtype)
    stays = strides == ((1, 3) if flips else (3, 1))
    if stays:
        monkeypatch.setattr(_inference, "probed_alone", _no_probe)
    for _ in range(3):
        output = network(torch.randn(3, 3, dtype=dtype))
        expected = rows(output, trainable(network))
        for engine in _engines(network):
            with _meeting(not stays):
                J = engine.jacobian(output, retain_graph=True)
            error = torch.finfo(dtype).eps
            torch.testing.assert_close(J.matrix(), expected, rtol=40 * error, atol=40 * error)


STRIDES = [(a, b) for a in range(3) for b in range(3) if 2 * a + b <= 5]  # of [3, 2], within 6


@pytest.mark.parametrize("first", STRIDES)
def test_numbers_that_share_memory(first: tuple[int, int]) -> None:
    """Read twice by strides, where several numbers may lie in one place."""
    layer, head = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    model = nn.ModuleList([layer, head])
    engine = Engine(model, check="never")
    for second in STRIDES:
        read = layer(double(3, 2)).tanh().as_strided((3, 2), first)
        again = read.as_strided((3, 2), second)
        output = head(again).squeeze(1)
        expected = rows(output, trainable(model))
        with _meeting(True):
            found = engine.jacobian(output).matrix()
        torch.testing.assert_close(found, expected)


def test_an_image_pooled_to_a_pixel_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling reads its own result by strides if that has one row of pixels."""
    network = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 1)
    )
    monkeypatch.setattr(_inference, "probed_alone", _no_probe)
    x = torch.randn(4, 5, 2, dtype=torch.float64).transpose(1, 2)
    output = network.double()(x)[:, 0]
    _assert_exact(_engines(network), network, output)


def test_a_product_with_a_matrix_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    network = Network([Spelling("a matrix", "brackets", "index_add", "linear", False)], "index_add")
    monkeypatch.setattr(_trial, "probed", _no_probe)
    with pytest.raises(AssertionError, match="probed"):
        Engine(network.double()).jacobian(network(batch([2, 3]))[:, 0])


# Layers that others wrote.


@pytest.mark.parametrize("layer", [GCNConv, SAGEConv, GATConv])
def test_layers_of_pyg(layer: Callable[[int, int], nn.Module]) -> None:
    model = Parts()
    model.conv, model.norm = layer(D, D).double(), GraphNorm(D).double()
    engines = _engines(model)
    for sizes, share, _ in BATCHES:
        b = batch(sizes, share=share)
        h = model.conv(torch.tanh(model.lift(b.atoms)), torch.stack([b.sender, b.receiver]))
        h = model.norm(torch.tanh(h), b.owner, b.poses)
        _assert_exact(engines, model, total(b.owner, model.energy(h), b.poses))


# Numbers that are no numbers.


@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_a_row_is_nan_or_right(check: str) -> None:
    """Zero times nan is nan, so a plain backward has the nan of one pose in every row."""
    model, b = Parts(), batch([3, 2, 4])
    expected = rows(graph(model, b=b), trainable(model))
    b.atoms[b.owner == 1] = torch.nan
    with _meeting(True):  # where nothing is known, it may
        found = Engine(model, check=check).jacobian(graph(model, b=b)).matrix()
    assert bool(found[1].isnan().any())
    _assert_equal(torch.where(found.isnan().any(1, keepdim=True), expected, found), expected)


@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_nan_of_atoms_that_no_pose_has(check: str) -> None:
    """Nobody's cotangent is zero; but the slope it is multiplied by may be infinite."""
    model, used = Parts(), torch.tensor([0, 1, 3])
    mask = torch.zeros(6, 1).double().index_fill(0, used, 1)
    output = (model.lift(double(6, 3)) * mask).norm(dim=1).sqrt()[used]
    expected = rows(output, trainable(model))
    assert bool(expected.isnan().any(1).all())
    with _meeting(True):
        J = Engine(model, check=check).jacobian(output)
    assert torch.equal(J.matrix().isnan(), expected.isnan())
    total = torch.cat([g.flatten() for g in J.combine(torch.ones(3).double()).values()])
    assert torch.equal(total.isnan(), expected.sum(0).isnan())


def test_a_table_that_nothing_is_looked_up_in() -> None:
    model, none = Parts(), torch.zeros(0).long()
    looked_up = functional.embedding(none, model.table)
    output = model.energy(model.rows(3).index_add(0, none, looked_up))
    _assert_exact(_engines(model), model, output)


class Picking(nn.Module):
    """Outputs that pick rows of one batch: the same for two of them, they mix."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, picks: Tensor) -> Tensor:
        scores: Tensor = self.above(self.below(x).tanh()[picks]).squeeze(1)
        return scores


@pytest.mark.parametrize("first", ["apart", "mixed"])
def test_a_batch_that_mixes_has_no_effect_on_those_after_it(first: str) -> None:
    model = Picking().double()
    engine = Engine(model)
    apart, mixed = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 2, 1])
    order = [apart, apart, mixed] if first == "apart" else [mixed, apart, apart]
    for picks in [*order, apart, mixed, apart, mixed, apart]:
        output = model(double(4, 3), picks)
        expected = rows(output, trainable(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected)
    assert J.report().splitlines()[1] == "1 backward to the activations"
    assert all(path.startswith("closed form") for own in J.paths.values() for path in own)
