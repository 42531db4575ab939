"""Rows that are picked and added up by number: whose they are is read off the numbers alone.

A wrong owner would give a wrong gradient without a word, so nothing here relies on the comparison
with a plain backward that an engine makes: every law holds with `check="never"`, and with
`check="always"` no engine finds anything to complain of.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import GATConv, GCNConv, GraphNorm, SAGEConv
from torch_geometric.utils import scatter, softmax, to_dense_batch

from posegrad import Engine, StaleFactorError
from posegrad.graph import _inference, _trial
from posegrad.jacobian import Layout
from tests.jacobian.test_grammar import Step
from tests.reference import gramian, product, rows, trainable

D = 4  # features of an atom


class Batch(NamedTuple):
    """A ragged batch: atoms `[N, 3]`, their poses `[N]`, and edges between atoms `[E]`."""

    atoms: Tensor
    owner: Tensor
    sender: Tensor
    receiver: Tensor
    poses: int


def batch(sizes: list[int], *, share: float = 0.6, loops: bool = False) -> Batch:
    """Poses of so many atoms each, in no order, with a share of all edges within them."""
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    owner = owner[torch.randperm(len(owner))]
    pairs = (owner[:, None] == owner).logical_and(torch.rand(len(owner), len(owner)) < share)
    pairs = pairs if loops else pairs.fill_diagonal_(False)
    edges = pairs.nonzero()
    sender, receiver = edges[torch.randperm(len(edges))].T
    return Batch(_double(len(owner), 3), owner, sender, receiver, len(sizes))


def _double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """The same number for every feature, `[E]` to `[E, d]`."""
    return index.unsqueeze(1).expand(-1, x.shape[1])


def _every_second(x: Tensor, index: Tensor) -> Tensor:
    both = index.repeat_interleave(2)
    return x[both][torch.arange(len(both)) % 2 == 1]


def _two(index: Tensor) -> Tensor:
    return torch.arange(2).repeat(len(index))


def _filled_up(x: Tensor, index: Tensor) -> Tensor:
    """Half of the rows of each of two dimensions, as of a batch that was filled up."""
    both = torch.stack([x[index], x[index].detach()], dim=1)  # [E, 2, d]
    mask = torch.arange(2 * len(index)).view(-1, 2) % 2 == 0
    return both[mask]


# name: from atoms `[N, d]` and numbers `[E]` to `[E, d]`
PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_select": lambda x, i: x.index_select(0, i),
    "index_select of 32 bits": lambda x, i: x.index_select(0, i.int()),
    "index_select of columns": lambda x, i: x.T.index_select(-1, i).T,
    "brackets": lambda x, i: x[i],
    "brackets and a colon": lambda x, i: x[i, :],
    "brackets behind a colon": lambda x, i: x.T[:, i].T,
    "brackets, of 32 bits": lambda x, i: x[i.int()],
    "brackets, twice": lambda x, i: x.flip(0)[torch.arange(len(x)).flip(0)][i],
    "from the end": lambda x, i: x[i - len(x)],
    "partly from the end": lambda x, i: x[torch.where(i % 2 == 0, i, i - len(x))],
    "a mask": _every_second,
    "gather, expanded": lambda x, i: x.gather(0, _wide(i, x)),
    "gather, written out": lambda x, i: x.gather(0, _wide(i, x).contiguous()),
    "gather of columns": lambda x, i: x.T.gather(-1, _wide(i, x).T).T,
    "gather, sparse": lambda x, i: (x[i] + x.gather(0, _wide(i, x), sparse_grad=True)) / 2,
    "take_along_dim": lambda x, i: torch.take_along_dim(x, i.unsqueeze(1), 0),
    "heads": lambda x, i: x.view(-1, 2, D // 2)[i].view(-1, D),
    "number and feature": lambda x, i: x[i.unsqueeze(1), torch.arange(D)],
    "two numbers": lambda x, i: x.view(len(x), 2, -1)[i.repeat_interleave(2), _two(i)].view(-1, D),
    "a mask of two dimensions": lambda x, i: _filled_up(x, i),
    "split and joined": lambda x, i: x[i].view(-1, 2, D // 2).flatten(0, 1).view(-1, D),
    "embedding": lambda x, i: functional.embedding(i, x),
    "a matrix": lambda x, i: torch.eye(len(x), dtype=x.dtype)[i] @ x,
}


def _reduced(how: str, include: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda into, i, x: into.scatter_reduce(0, _wide(i, x), x, how, include_self=include)


def _scattered(how: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda into, i, x: into + scatter(x, i, 0, len(into), how)


def _attended(into: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return into.index_add(0, index, x * softmax(x, index, num_nodes=len(into)))


def _averaged(into: Tensor, index: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros_like(into).index_add(0, index, x)
    return into + total / torch.bincount(index, minlength=len(into)).clamp(min=1).unsqueeze(1)


def _by_segment(into: Tensor, index: Tensor, x: Tensor) -> Tensor:
    if not len(x):  # which torch refuses
        return into
    sizes = torch.bincount(index, minlength=len(into))
    return into + torch.segment_reduce(x[index.argsort()], "sum", lengths=sizes, axis=0, initial=0)


# name: from atoms `[N, d]`, numbers `[E]` and messages `[E, d]` to atoms `[N, d]`
ADDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_add": lambda into, i, x: into.index_add(0, i, x),
    "index_add of 32 bits": lambda into, i, x: into.index_add(0, i.int(), x, alpha=2),
    "index_add to columns": lambda into, i, x: into.T.index_add(-1, i, x.T).T,
    "index_add_": lambda into, i, x: into.clone().index_add_(0, i, x),
    "index_put": lambda into, i, x: into.index_put((i,), x, accumulate=True),
    "index_put from the end": lambda into, i, x: into.index_put((i - len(into),), x, True),
    "index_put_": lambda into, i, x: into.clone().index_put_((i,), x, accumulate=True),
    "scatter_add, expanded": lambda into, i, x: into.scatter_add(0, _wide(i, x), x),
    "scatter_add to columns": lambda into, i, x: into.T.scatter_add(-1, _wide(i, x).T, x.T).T,
    "scatter_add_, written out": (
        lambda into, i, x: into.clone().scatter_add_(0, _wide(i, x).contiguous(), x)
    ),
    **{
        f"scatter_reduce {how}{'' if include else ', anew'}": _reduced(how, include)
        for how in ("sum", "mean", "amax", "amin", "prod")
        for include in (True, False)
    },
    **{f"PyG {how}": _scattered(how) for how in ("sum", "mean", "max", "min", "mul")},
    "PyG softmax": _attended,
    "mean": _averaged,
    "segment_reduce": _by_segment,
}


def _convolved(x: Tensor, module: nn.Module) -> Tensor:
    return module(x.unsqueeze(1)).sum(1)


def _typed(x: Tensor, table: nn.Module) -> Tensor:
    return x + table(x.detach()[:, 0].abs().long().clamp(max=2))


def _by_head(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nhd,hde->nhe", x.view(-1, 2, D // 2), w).flatten(1)


# name: what makes atoms of atoms, `[N, d]`
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "weight on the left": lambda: Step(lambda x, w: (w @ x.T).T, w=torch.randn(D, D)),
    "layer norm": lambda: nn.LayerNorm(D, eps=0.1),
    "group norm": lambda: nn.GroupNorm(2, D, eps=0.1),
    "batch norm": lambda: nn.BatchNorm1d(D).eval(),
    "convolution": lambda: Step(_convolved, nn.Conv1d(1, 2, 3, padding=1)),
    "scale and bias": lambda: Step(
        lambda x, s, b: x * s + b, s=torch.randn(D), b=torch.randn(1, D)
    ),
    "types": lambda: Step(_typed, nn.Embedding(3, D, padding_idx=0)),
    "heads": lambda: Step(_by_head, w=torch.randn(2, D // 2, D // 2)),
    "recursion": lambda: Step(lambda x, f: f(torch.tanh(f(x))), nn.Linear(D, D)),
}


def _dealt(y: Tensor) -> Tensor:
    return y[torch.randperm(len(y)), 0]


# name: from predictions `[m, 2]` to the output
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda y: y[:, 0],
    "column": lambda y: y[:, :1],
    "vector": lambda y: y,
    "pose second": lambda y: y.mT if len(y) > 1 else y,  # [K, 1] reads as K poses
    "losses": lambda y: (y - y.detach().round()).square().sum(1),
    "in another order": _dealt,
    "without the last": lambda y: _dealt(y)[: max(1, len(y) - 1)],
    "of some": lambda y: y[torch.rand(len(y)) < 2 / len(y)][:, 0] if len(y) > 2 else y[:, 1],
}


class Spelling(NamedTuple):
    """How one layer is written down."""

    sent: str
    received: str
    added: str
    layer: str
    into_atoms: bool


class Network(nn.Module):
    """Message passing; how it indexes is drawn."""

    def __init__(self, layers: list[Spelling], pooled: str) -> None:
        super().__init__()
        self.spellings, self.pooled = layers, pooled
        self.lift, self.head = nn.Linear(3, D), nn.Linear(D, 2)
        self.messages = nn.ModuleList(nn.Linear(2 * D, D) for _ in layers)
        self.updates = nn.ModuleList(LAYERS[one.layer]() for one in layers)

    def forward(self, b: Batch) -> Tensor:
        h = torch.tanh(self.lift(b.atoms))
        for one, message, update in zip(self.spellings, self.messages, self.updates, strict=True):
            pair = PICKS[one.sent](h, b.sender), PICKS[one.received](h, b.receiver)
            sent = torch.tanh(message(torch.cat(pair, dim=1)))
            into = h if one.into_atoms else torch.zeros_like(h)
            h = h + torch.tanh(update(ADDS[one.added](into, b.receiver, sent)))
        return self.head(torch.tanh(ADDS[self.pooled](h.new_zeros(b.poses, D), b.owner, h)))


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


def _assert_exact(engines: list[Engine], model: nn.Module, output: Tensor) -> None:
    """Rows, products and norms, with one relative precision for all parameters."""
    parameters = trainable(model)
    expected, w = rows(output, parameters), torch.randn_like(output)
    combined = torch.cat([g.flatten() for g in product(w, expected, parameters).values()])
    for engine in engines:
        J = engine.jacobian(output, retain_graph=True)
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


# The last has as many poses as atoms, edges and features.
BATCHES = [([3, 1, 2], 0.6, False), ([1, 1, 1, 1], 1.0, True)]


@pytest.mark.parametrize("pick", PICKS)
def test_every_way_to_pick(pick: str) -> None:
    layer = Spelling(pick, pick, "index_add", "linear", False)
    Sentence([layer], "index_add", "one number", BATCHES).assert_exact()


@pytest.mark.parametrize("add", ADDS)
def test_every_way_to_add(add: str) -> None:
    layer = Spelling("brackets", "index_select", add, "linear", True)
    Sentence([layer], add, "one number", BATCHES).assert_exact()


class Parts(nn.Module):
    """What the networks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.mix, self.head = nn.Linear(3, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.token = nn.Parameter(torch.randn(D))
        self.table = nn.Parameter(torch.randn(3, D))
        self.double()

    def rows(self, *shape: int) -> Tensor:
        """Activations `[*shape, D]`."""
        return torch.tanh(self.lift(_double(*shape, 3)))

    def energy(self, h: Tensor) -> Tensor:
        """One number for each row."""
        return self.head(torch.tanh(self.mix(h))).squeeze(-1)


def _numbers(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape)


def _total(owner: Tensor, energies: Tensor, count: int = 3) -> Tensor:
    return energies.new_zeros(count).index_add(0, owner, energies)


def _within(owner: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Numbers of rows of one pose for each entry along dimension 0, and these poses."""
    poses = _numbers(int(owner.max()) + 1, shape[0])
    rows_of = [(owner == pose).nonzero()[:, 0] for pose in poses]
    numbers = torch.stack([own[_numbers(len(own), *shape[1:])] for own in rows_of])
    return numbers, poses


OWNER = torch.tensor([1, 0, 2, 1, 0, 1, 2])


def _differs_along_features(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5, D)
    return _total(poses, p.energy(p.rows(7).gather(0, index)))


def _spread_along_features(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5, D)
    pieces = torch.stack([p.rows(1)[0] for _ in poses])
    return _total(OWNER, p.energy(torch.zeros(7, D).double().scatter_add(0, index, pieces)))


def _narrower(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    some = p.rows(7).gather(0, index.unsqueeze(1).expand(-1, 2))
    return _total(poses, p.energy(some.repeat(1, 2)))


def _put(p: Parts, *, accumulate: bool) -> Tensor:
    index = torch.tensor([0, 2, 0, 3, 2])
    return p.energy(p.rows(4).index_put((index,), p.rows(5), accumulate=accumulate))


def _put_by_mask(p: Parts) -> Tensor:
    mask = torch.tensor([True, False, True, True])
    h = p.rows(4).clone()
    h[mask] = p.rows(3)
    return p.energy(h)


def _put_in_columns(p: Parts) -> Tensor:
    h = p.rows(4).T.clone()
    h[:, torch.tensor([2, 0, 2])] += p.rows(3).T
    return p.energy(h.T)


def _token_put(p: Parts) -> Tensor:
    h = p.rows(5).clone()
    h[torch.rand(5) < 0.5] = p.token
    return p.energy(h)


def _block(p: Parts, h: Tensor, b: Batch) -> Tensor:
    sent = torch.tanh(p.mix(h[b.sender] * h.index_select(0, b.receiver)))
    return h + torch.zeros_like(h).scatter_add(0, _wide(b.receiver, sent), sent)


def _graph(p: Parts, *, checkpointed: bool = False, b: Batch | None = None) -> Tensor:
    b = b or batch([3, 1, 4])
    h = torch.tanh(p.lift(b.atoms))
    h = checkpoint(_block, p, h, b, use_reentrant=False) if checkpointed else _block(p, h, b)
    return _total(b.owner, p.energy(_block(p, h, b)))


def _seconds(p: Parts) -> Tensor:
    """Poses lie second, `[T, m]`, and are picked along that dimension."""
    index = torch.tensor([2, 0, 3, 1, 0])
    sums = p.rows(2, 4)[:, index].index_select(1, torch.tensor([3, 1, 0, 2])).sum((0, 2))
    return sums.sin()


def _seconds_by_gather(p: Parts) -> Tensor:
    grid = p.energy(p.rows(2, 4))
    return grid.gather(1, torch.tensor([3, 1, 0, 2]).expand(2, -1)).sin().sum(0)


def _seconds_added(p: Parts) -> Tensor:
    grid = p.energy(p.rows(2, 7))
    return grid.new_zeros(2, 3).index_add(-1, OWNER, grid).sin().sum(0)


def _heads_merged(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    heads = torch.einsum("nd,hde->nhe", p.rows(7), p.table.reshape(3, 2, 2).repeat(1, 2, 1))
    return _total(poses, p.energy(heads[index].reshape(5, 6)[:, :D]))


def _heads_split(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    heads = p.rows(7)[index].view(5, 2, 2)
    return _total(poses, torch.softmax(heads @ heads.mT, dim=-1).flatten(1).square().sum(1))


def _rows_split(p: Parts) -> Tensor:
    """`[m T, d]` to `[m, T, d]`, behind and before something indexed."""
    rows_of = p.rows(6)[torch.tensor([1, 0, 3, 2, 5, 4])]
    merged = rows_of.view(3, 2, D).cumsum(1).view(6, D)
    return p.energy(merged[torch.tensor([4, 5, 0, 1, 2, 3])].view(3, 2, D).sum(1))


def _padded(p: Parts) -> Tensor:
    h = p.rows(7)[OWNER.argsort()]
    dense, mask = to_dense_batch(h, OWNER.sort().values)
    return (p.energy(dense) * mask).sum(1)


def _unpadded(p: Parts) -> Tensor:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    owner = mask.nonzero()[:, 0]
    flat = p.rows(3, 3).flatten(0, 1)[mask.flatten().nonzero()[:, 0]]
    return _total(owner, p.energy(flat)) + _total(owner, p.energy(p.rows(3, 3)[mask]))


def _by_sorting(p: Parts) -> Tensor:
    order = OWNER.argsort()
    h = p.rows(7)[order]
    ends = torch.bincount(OWNER).cumsum(0)
    return torch.stack([p.energy(part).sum() for part in h.tensor_split(ends[:-1].tolist())])


def _repeated(p: Parts) -> Tensor:
    counts = torch.tensor([2, 0, 3])
    each = p.rows(3).repeat_interleave(counts, dim=0)
    return _total(torch.arange(3).repeat_interleave(counts), p.energy(each * p.rows(5)))


def _segments(p: Parts) -> Tensor:
    lengths = torch.tensor([2, 1, 4])
    return p.energy(torch.segment_reduce(p.rows(7), "max", lengths=lengths, axis=0))


def _forces(p: Parts) -> Tensor:
    """Predictions that are derivatives: the graph of a backward, which indexes the other way."""
    b = batch([3, 1, 4])
    atoms = b.atoms.requires_grad_()
    apart = atoms[b.sender] - atoms.index_select(0, b.receiver)
    energies = p.energy(torch.tanh(p.lift(apart)))
    (force,) = torch.autograd.grad(energies.sum(), atoms, create_graph=True)
    return _total(b.owner, force.square().sum(1))


def _mapped(p: Parts) -> Tensor:
    def one(x: Tensor, index: Tensor) -> Tensor:
        h = torch.tanh(p.lift(x))
        return p.energy(torch.zeros_like(h).index_add(0, index, h[index.flip(0)])).sum()

    return torch.func.vmap(one)(_double(3, 5, 3), _numbers(5, 3, 5))


def _sparse(p: Parts) -> Tensor:
    b = batch([3, 1, 4])
    matrix = torch.zeros(8, 8).double()
    matrix[b.receiver, b.sender] = 1
    with torch.sparse.check_sparse_tensor_invariants():
        matrix = matrix.to_sparse()
    return _total(b.owner, p.energy(torch.sparse.mm(matrix, torch.tanh(p.lift(b.atoms)))))


def _other_operators(p: Parts) -> Tensor:
    """Those that pick or put by number too, and have no rule."""
    h, index = p.rows(3), torch.tensor([2, 0])
    h = h.index_copy(0, index, p.rows(2)).index_fill(0, torch.tensor([1]), 0.5) * h
    h = h.masked_scatter(torch.tensor([[True], [False], [True]]), p.rows(2))
    h = h.scatter(1, torch.tensor([[0], [1], [2]]), p.rows(3)[:, :1])
    return p.energy(h.put(torch.tensor([0, 5]), p.rows(1)[0, :2])).take(torch.tensor([2, 0, 1]))


def _tokens(p: Parts) -> Tensor:
    """A parameter picked from by number, one added to by number."""
    start = p.token.expand(3, D).index_add(0, OWNER, p.table[OWNER] * p.rows(7))
    return p.energy(start + torch.tanh(p.table).gather(0, _numbers(3, 3, D)))


def _one_row_for_all(p: Parts, *, accumulate: bool) -> Tensor:
    """A vector is put into as many rows as it has numbers."""
    numbers = torch.tensor([0, 2, 3, 5])
    h = p.rows(6).index_put((numbers,), torch.tanh(p.token), accumulate=accumulate)
    return p.energy(h)


def _one_matrix_for_all(p: Parts) -> Tensor:
    """Poses lie second, as many as features, and meet in no number."""
    h = p.rows(3, D).index_put((torch.tensor([0, 2]),), p.rows(D), accumulate=True)
    return p.energy(h).sum(0)


def _one_row_of_poses(p: Parts) -> Tensor:
    grid = p.energy(p.rows(2, 5)).clone()
    grid[:, torch.tensor([3, 0])] = p.energy(p.rows(2))  # in both rows
    return grid.sin().sum(0)


def _single(p: Parts) -> Tensor:
    """A tensor without dimensions, scattered."""
    return p.energy(p.rows(3)).scatter_add(0, torch.tensor(1), p.energy(p.rows()))


def _single_gathered(p: Parts) -> Tensor:
    """A tensor without dimensions, picked for every pose."""
    return (p.energy(p.rows(3)) + p.energy(p.rows()).gather(0, torch.zeros(3).long())).sin()


def _features_of_no_edges(p: Parts) -> Tensor:
    none, h = torch.zeros(0).long(), p.rows(0)
    h = h.scatter_add(1, none.reshape(0, 1).expand(0, D), h.sin())
    return p.energy(p.rows(3).index_add(0, none, h))


def _no_features(p: Parts) -> Tensor:
    index = torch.tensor([1, 0, 2])
    none = p.rows(3)[:, :0].gather(0, index.unsqueeze(1).expand(3, 0))
    return p.energy(p.rows(3)[index]) + none.sum(1)


# name: networks whose poses stay apart, in rows of any kind
APART: dict[str, Callable[[Parts], Tensor]] = {
    "features picked": lambda p: p.energy(p.rows(5)[:, torch.tensor([0, 2, 2, 1])]),
    "rows and features picked": lambda p: p.energy(p.rows(5)[torch.randperm(5)][:, _numbers(D, D)]),
    "features picked row by row": lambda p: p.energy(p.rows(5).gather(1, _numbers(D, 5, D))),
    "features added up row by row": lambda p: p.energy(
        p.rows(5).scatter_add(1, _numbers(D, 5, D), p.rows(5))
    ),
    "features of fewer rows": lambda p: p.energy(
        p.rows(5).scatter_add(1, _numbers(D, 3, 2), torch.ones(5, D).double())
    ),
    "numbers differ along features": _differs_along_features,
    "sums differ along features": _spread_along_features,
    "numbers for some features": _narrower,
    "duplicates put": lambda p: _put(p, accumulate=False),
    "duplicates added up": lambda p: _put(p, accumulate=True),
    "put by a mask": _put_by_mask,
    "put in columns": _put_in_columns,
    "a token put": _token_put,
    "tokens": _tokens,
    "a graph": _graph,
    "a checkpointed block": lambda p: _graph(p, checkpointed=True),
    "poses second": _seconds,
    "poses second, by gather": _seconds_by_gather,
    "poses second, added up": _seconds_added,
    "heads merged": _heads_merged,
    "heads split": _heads_split,
    "rows split": _rows_split,
    "padded": _padded,
    "unpadded": _unpadded,
    "split by sorting": _by_sorting,
    "repeated": _repeated,
    "segments": _segments,
    "forces": _forces,
    "vmap": _mapped,
    "a sparse matrix": _sparse,
    "other operators": _other_operators,
    "poses in another order": lambda p: p.energy(p.rows(5))[torch.randperm(5)],
    "some poses": lambda p: p.energy(p.rows(5))[torch.randperm(5)[:3]],
    "some poses, from the end": lambda p: p.energy(p.rows(5)).index_select(0, torch.tensor([4, 1])),
    "poses by gather": lambda p: p.energy(p.rows(5)).gather(0, torch.randperm(5)),
    "several numbers per pose": lambda p: p.mix(p.rows(7))[OWNER.argsort()[:3]],
    "several numbers per pose, second": lambda p: p.mix(p.rows(7)).T[:, torch.tensor([6, 1, 2])],
    "no edges": lambda p: _graph(p, b=batch([1, 1, 1])),
    "no edges of every pose": lambda p: p.energy(p.rows(3) + p.rows(0).view(3, 0, D).sum(1)),
    "features of no edges": _features_of_no_edges,
    "no features": _no_features,
    "one row added to many": lambda p: _one_row_for_all(p, accumulate=True),
    "one row put into many": lambda p: _one_row_for_all(p, accumulate=False),
    "one matrix added to many": _one_matrix_for_all,
    "one row of poses put into many": _one_row_of_poses,
    "no dimensions, added": _single,
    "a mask of bytes": lambda p: p.energy(p.rows(3) * p.table[torch.ones(3, dtype=torch.uint8)]),
    "atoms of one pose": lambda p: _graph(p, b=batch([0, 7, 0])),
}


def _across(p: Parts, sender: list[int], receiver: list[int]) -> Tensor:
    """A graph of atoms of three poses, with these edges."""
    h, s, r = p.rows(7), torch.tensor(sender), torch.tensor(receiver)
    return _total(OWNER, p.energy(h + torch.zeros_like(h).index_add(0, r, p.mix(h[s]))))


def _one_feature_across(p: Parts) -> Tensor:
    index = torch.arange(4).unsqueeze(1).repeat(1, D)
    index[3, -1] = 0
    return p.energy(p.rows(4).gather(0, index))


def _two_ways(p: Parts) -> Tensor:
    h = p.rows(4)
    return p.energy(h[torch.tensor([0, 1, 2, 3])] + h.index_select(0, torch.tensor([0, 1, 3, 2])))


def _checkpointed_across(p: Parts) -> Tensor:
    b, atoms = batch([3, 1, 4]), torch.arange(8)
    return _graph(p, checkpointed=True, b=b._replace(sender=atoms, receiver=atoms.flip(0)))


def _outputs_share(p: Parts) -> Tensor:
    picked = torch.tensor([0, 1, 2, 2, 3, 0, 5])
    return torch.zeros(3).double().scatter_add(0, OWNER, p.energy(p.rows(6))[picked])


# name: networks in which poses meet
SHARED: dict[str, Callable[[Parts], Tensor]] = {
    "an atom of two poses": lambda p: _total(OWNER, p.energy(p.rows(6)[[0, 1, 2, 3, 4, 5, 5]])),
    "an atom of two poses, by gather": lambda p: _total(
        OWNER, p.energy(p.rows(6)).gather(0, torch.tensor([0, 1, 2, 3, 4, 5, 5]))
    ),
    "an atom of all poses": lambda p: p.energy(p.rows(2)[torch.zeros(4).long()] * p.rows(4)),
    "an edge between poses": lambda p: _across(p, [1, 4, 0, 2], [4, 1, 5, 0]),
    "two layers of edges": lambda p: _across(p, [1, 4, 3, 2], [4, 1, 0, 3]) + _across(p, [0], [3]),
    "edges between poses in a checkpoint": _checkpointed_across,
    "no dimensions, picked by all": _single_gathered,
    "a feature of another pose": _one_feature_across,
    "two uses, two owners": _two_ways,
    "an output of another": lambda p: (y := p.energy(p.rows(4))) + y[torch.tensor([0, 2, 1, 3])],
    "outputs that share atoms": _outputs_share,
    "outputs asked for twice": lambda p: p.energy(p.rows(4))[torch.tensor([3, 0, 0, 1])],
    "several numbers, asked for twice": lambda p: p.mix(p.rows(4))[torch.tensor([3, 0, 0, 1])],
}


@pytest.mark.parametrize("owner", [OWNER, torch.arange(7).flip(0)])
@pytest.mark.parametrize("pick", PICKS)
def test_parameters_picked_by_number(pick: str, owner: Tensor) -> None:
    """Of a parameter's own rows any pose may have any, alone or with others."""
    model = Parts()
    drawn = PICKS[pick](model.table, _numbers(3, 7)) + PICKS[pick](model.table.tanh(), OWNER)
    output = _total(owner, model.energy(drawn * model.rows(7)), int(owner.max()) + 1)
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


# Chains of moves of `[A, R, B]`, where the R rows have owners; a move knows what becomes of them.

Owned = tuple[Tensor, Tensor]


def _picked(x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    index = _numbers(len(owner), int(_numbers(7))) if len(owner) else owner
    return index, owner[index]


def _along_rows(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Owned]:
    def step(x: Tensor, owner: Tensor) -> Owned:
        index, owners = _picked(x, owner)
        return function(x, index), owners

    return step


def _into_rows(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Owned]:
    """Adds every row up into some row of its owner, of which there is one more each."""

    def step(x: Tensor, owner: Tensor) -> Owned:
        owners = torch.cat([owner, torch.arange(int(owner.max()) + 1 if len(owner) else 1)])
        owners = owners[torch.randperm(len(owners))]
        index = torch.tensor([_any_of(owners == one) for one in owner], dtype=torch.long)
        into = 0.5 * torch.ones(x.shape[0], len(owners), x.shape[2]).double()
        return function(into, index, x), owners

    return step


def _any_of(mask: Tensor) -> int:
    places = mask.nonzero()[:, 0]
    return int(places[_numbers(len(places))])


def _middle(index: Tensor, x: Tensor) -> Tensor:
    return index.reshape(1, -1, 1).expand(x.shape[0], -1, x.shape[2])


def _masked(x: Tensor, owner: Tensor) -> Owned:
    mask = torch.rand(len(owner)) < 0.7
    return x[:, mask], owner[mask]


def _written(into: Tensor, index: Tensor, x: Tensor) -> Tensor:
    into = into.clone()
    into[:, index] += x
    return into


def _flat(x: Tensor, owner: Tensor) -> Owned:
    """Numbers and features in one dimension, picked there."""
    index, owners = _picked(x, owner)
    b = x.shape[2]
    numbers = (index.unsqueeze(1) * b + torch.randperm(b)).flatten()
    return x.flatten(1, 2)[:, numbers].unflatten(1, (-1, b)), owners


def _front(x: Tensor, owner: Tensor) -> Owned:
    """Rows in front, of everything else in one dimension."""
    index, owners = _picked(x, owner)
    a, _, b = x.shape
    front = x.transpose(0, 1).reshape(-1, a * b)[index]
    return front.view(-1, a, b).transpose(0, 1), owners


def _doubled(x: Tensor, owner: Tensor) -> Owned:
    return torch.cat([x, x.sin()], dim=1), owner.repeat(2)


def _same(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Owned]:
    return lambda x, owner: (function(x), owner)


def _per_row(x: Tensor) -> Tensor:
    return x.gather(2, _numbers(x.shape[2], *x.shape)).scatter_add(0, _numbers(len(x), *x.shape), x)


# name: from rows and their owners to others
MOVES: dict[str, Callable[[Tensor, Tensor], Owned]] = {
    "index_select": _along_rows(lambda x, i: x.index_select(-2, i)),
    "brackets": _along_rows(lambda x, i: x[:, i]),
    "brackets in the middle": _along_rows(lambda x, i: x[:, i, :]),
    "gather": _along_rows(lambda x, i: x.gather(1, _middle(i, x))),
    "gather, written out": _along_rows(lambda x, i: x.gather(-2, _middle(i, x).contiguous())),
    "gather, of fewer": _along_rows(lambda x, i: x.gather(1, _middle(i, x)[:1]).expand_as(x[:, i])),
    "take_along_dim": _along_rows(lambda x, i: torch.take_along_dim(x, i.reshape(1, -1, 1), dim=1)),
    "rows last": _along_rows(lambda x, i: x.mT[..., i].mT),
    "rows last, gather": _along_rows(lambda x, i: x.mT.gather(2, _middle(i, x).mT).mT),
    "rows first": _along_rows(lambda x, i: x.transpose(0, 1).contiguous()[i].transpose(0, 1)),
    "rows of one": _along_rows(lambda x, i: torch.stack([one[i] for one in x.unbind(0)])),
    "a mask": _masked,
    "index_add": _into_rows(lambda into, i, x: into.index_add(1, i, x, alpha=-1)),
    "index_add, rows last": _into_rows(lambda into, i, x: into.mT.index_add(-1, i, x.mT).mT),
    "scatter_add": _into_rows(lambda into, i, x: into.scatter_add(1, _middle(i, x), x)),
    "scatter_add_": _into_rows(
        lambda into, i, x: into.clone().scatter_add_(-2, _middle(i, x).contiguous(), x)
    ),
    "scatter_reduce": _into_rows(
        lambda into, i, x: into.scatter_reduce(1, _middle(i, x), x, "amax", include_self=False)
    ),
    "scatter_reduce, mean": _into_rows(
        lambda into, i, x: into.scatter_reduce(1, _middle(i, x), x, "mean")
    ),
    "PyG": _into_rows(lambda into, i, x: into + scatter(x, i, 1, into.shape[1], "mean")),
    "written": _into_rows(_written),
    "flat": _flat,
    "in front": _front,
    "doubled": _doubled,
    "features": _same(lambda x: x[..., torch.tensor([1, 0, 1])]),
    "features by row": _same(_per_row),
    "others": _same(lambda x: x[torch.randperm(len(x))].index_select(0, torch.tensor([1, 1, 0]))),
    "cut": _same(lambda x: torch.cat([x.narrow(2, 1, 1), *x.chunk(2, dim=2)], dim=2)),
    "softmax": _same(lambda x: x.softmax(0) + x.log_softmax(2)),
    "expanded": _same(lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).sum(1)),
    "selected": _same(lambda x: x * x[0] + x[..., 1].unsqueeze(2)),
    "permuted": _same(lambda x: x.permute(2, 0, 1).contiguous().cumsum(1).permute(1, 2, 0)),
    "one dimension": _same(lambda x: x.flatten(0, 1).view(x.shape)),
    "two dimensions": _same(lambda x: x.reshape(len(x), -1).reshape(x.shape).tanh()),
}


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
        return _total(owner, torch.tanh(x).square().sum((0, 2)), count)


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
    model(_double(2, 1, 2), torch.zeros(1).long(), 1)  # the layers learn their widths
    engines = _engines(model)
    for own in sizes:
        owner = batch(own).owner
        _assert_exact(engines, model, model(_double(2, len(owner), 2), owner, len(own)))


# One operator of tensors of any shape, with poses along any dimension of the result.


class Leaves(nn.Module):
    """Activations of any shape, of a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = nn.ParameterList()

    def new(self, shape: list[int]) -> Tensor:
        self.leaves.append(nn.Parameter(_double(*shape)))
        return torch.tanh(self.leaves[-1])


def _sized(shape: list[int], dim: int, size: int) -> list[int]:
    return [*shape[:dim], size, *shape[dim + 1 :]]


def _each(shape: list[int], dim: int, below: int) -> Tensor:
    """A number for every element, or one for all that differ in other dimensions only."""
    alone = [size if d == dim else 1 for d, size in enumerate(shape)]
    return _numbers(below, *(alone if torch.rand(()) < 0.5 else shape)).expand(shape)


def _broadcast(shape: list[int]) -> list[int]:
    """A shape that broadcasts to this one."""
    some = [1 if torch.rand(()) < 0.2 else size for size in shape]
    return some[int(_numbers(len(some) + 1)) :]


def _larger(shape: list[int]) -> list[int]:
    return [size + int(_numbers(2)) for size in shape]


def _set(m: Leaves, shape: list[int], dim: int) -> Tensor:
    x = m.new(shape).clone()
    place = (slice(None),) * dim
    if torch.rand(()) < 0.3:
        mask = torch.rand(shape[dim]) < 0.7
        x[(*place, mask)] = m.new(_broadcast(_sized(shape, dim, int(mask.sum()))))
    else:
        x[(*place, _numbers(shape[dim], 3))] = m.new(_broadcast(_sized(shape, dim, 3)))
    return x


def _put_two(m: Leaves, shape: list[int], dim: int) -> Tensor:
    """With numbers for one dimension or for two."""
    places = tuple(_numbers(size, 3) for size in shape[: 1 + dim % 2])
    values = m.new(_broadcast([3, *shape[len(places) :]]))
    return m.new(shape).index_put(places, values, accumulate=bool(_numbers(2)))


# name: from shape and dimension to what the operator makes of leaves
OPERATORS: dict[str, Callable[[Leaves, list[int], int], Tensor]] = {
    "index_select": lambda m, s, d: m.new(s).index_select(d - len(s), _numbers(s[d], 3)),
    "brackets": lambda m, s, d: m.new(s)[(slice(None),) * d + (_numbers(s[d], 4) - s[d],)],
    # Written out: torch puts expanded numbers in wrong places of a tensor that is larger otherwise.
    "gather": lambda m, s, d: m.new(_larger(s)).gather(
        d, _each(_sized(s, d, 3), d, s[d]).contiguous()
    ),
    "index_add": lambda m, s, d: m.new(s).index_add(d, _numbers(s[d], 3), m.new(_sized(s, d, 3))),
    "scatter_add": lambda m, s, d: m.new(_larger(s)).scatter_add(
        d, _each(_sized(s, d, 4), d, s[d]).contiguous(), m.new(_sized(s, d, 4))
    ),
    "scatter_reduce": lambda m, s, d: m.new(s).scatter_reduce(
        d, _each(_sized(s, d, 4), d, s[d]), m.new(_sized(s, d, 4)), "amax"
    ),
    "index_put": _put_two,
    "set": _set,
}


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
    owner = _numbers(count, y.shape[along])
    each = (y * _double(*y.shape)).movedim(along, 0).unsqueeze(-1).flatten(1).sum(1)
    with _meeting(True):  # a row may be picked by several
        _assert_exact(_engines(model), model, _total(owner, each, count))


# What numbers may do between calls, and after one.


def _cycle(atoms: int, shift: int, owner: Tensor) -> Batch:
    """One edge for each atom, to the next of its pose."""
    receiver = torch.empty(atoms, dtype=torch.long)
    for pose in owner.unique():
        own = (owner == pose).nonzero()[:, 0]
        receiver[own] = own.roll(shift)
    return Batch(_double(atoms, 3), owner, torch.arange(atoms), receiver, 3)


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
        output = _graph(model, b=b)
        expected = rows(output, trainable(model))
        index = [b.owner, b.owner[b.sender]] if stated and not meeting else None
        with _meeting(meeting):
            for engine in engines:
                J = engine.jacobian(output, pose_index=index, retain_graph=True)
                _assert_equal(J.matrix(), expected)


def test_numbers_that_return_after_others() -> None:
    """What one graph said holds for the next only if it says it again, in whichever layer."""
    model = Parts()
    engines = _engines(model)
    turn, stay = _cycle(7, 1, OWNER), _cycle(7, 0, OWNER)
    elsewhere = _cycle(7, 1, OWNER.flip(0))
    for first, second in [(turn, turn), (turn, turn), (stay, turn), (turn, stay), (turn, turn)]:
        for b, other in ((first, second), (elsewhere, elsewhere)):
            h = _block(model, torch.tanh(model.lift(b.atoms)), b)
            output = _total(b.owner, model.energy(_block(model, h, other)))
            _assert_exact(engines, model, output)


def test_ragged_batches_leave_no_owners_behind() -> None:
    """Each is of a structure of its own; what is kept for a structure met again is bounded."""
    model, kept = Parts(), []
    engine = Engine(model, check="never")
    for size in range(3, 40):
        b = batch([size, 2, size + 1])
        engine.jacobian(_graph(model, b=b))
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
        output = network(b)[:, 0]
        expected = rows(output, trainable(network))
        for engine in engines:
            J = engine.jacobian(output, pose_index=[b.owner, b.owner[b.sender]], retain_graph=True)
            _assert_equal(J.matrix(), expected)


def test_a_gate_that_opens_later() -> None:
    """Numbers say that poses share atoms; while the gate is shut, no gradient does."""
    model, gate = Parts(), torch.zeros((), dtype=torch.float64)
    engines = _engines(model)
    for step in range(3):
        gate.fill_(step % 2)
        h = model.rows(7)
        output = _total(OWNER, model.energy(h + gate * h[torch.randperm(7)]))
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
    sums = torch.zeros(3, D).double().scatter_add(0, _wide(OWNER, model.table), model.rows(9))
    output = model.energy(sums)
    with pytest.raises(RuntimeError, match="returned an invalid gradient"):
        rows(output, trainable(model))
    with pytest.raises(RuntimeError, match="returned an invalid gradient"):
        Engine(model, check="never").jacobian(output)


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
        _assert_exact(engines, model, _total(b.owner, model.energy(h), b.poses))


# Numbers that are no numbers.


@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_a_row_is_nan_or_right(check: str) -> None:
    """Zero times nan is nan, so a plain backward has the nan of one pose in every row."""
    model, b = Parts(), batch([3, 2, 4])
    expected = rows(_graph(model, b=b), trainable(model))
    b.atoms[b.owner == 1] = torch.nan
    with _meeting(True):  # where nothing is known, it may
        found = Engine(model, check=check).jacobian(_graph(model, b=b)).matrix()
    assert bool(found[1].isnan().any())
    _assert_equal(torch.where(found.isnan().any(1, keepdim=True), expected, found), expected)


@pytest.mark.parametrize("check", ["never", "first", "always"])
def test_nan_of_atoms_that_no_pose_has(check: str) -> None:
    """Nobody's cotangent is zero; but the slope it is multiplied by may be infinite."""
    model, used = Parts(), torch.tensor([0, 1, 3])
    mask = torch.zeros(6, 1).double().index_fill(0, used, 1)
    output = (model.lift(_double(6, 3)) * mask).norm(dim=1).sqrt()[used]
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
        output = model(torch.randn(4, 3, dtype=torch.float64), picks)
        expected = rows(output, trainable(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            J = engine.jacobian(output)
        torch.testing.assert_close(J.matrix(), expected)
    assert J.report().splitlines()[1] == "1 backward to the activations"
    assert all(path.startswith("closed form") for own in J.paths.values() for path in own)
