"""Networks that pick and put by number: poses stay apart in those of APART, meet in SHARED."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import to_dense_batch

from tests.drawing import double
from tests.jacobian.indexed_table import Batch, D, batch, numbers, wide

__all__ = ["APART", "OWNER", "SHARED", "Parts", "block", "graph", "total"]

OWNER = torch.tensor([1, 0, 2, 1, 0, 1, 2])  # whose each of seven rows is


class Parts(nn.Module):
    """What the networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.mix, self.head = nn.Linear(3, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.token = nn.Parameter(torch.randn(D))
        self.table = nn.Parameter(torch.randn(3, D))
        self.double()

    def rows(self, *shape: int) -> Tensor:
        """Activations `[*shape, D]`."""
        return torch.tanh(self.lift(double(*shape, 3)))

    def energy(self, h: Tensor) -> Tensor:
        """One number for each row."""
        return self.head(torch.tanh(self.mix(h))).squeeze(-1)


Network = Callable[[Parts], Tensor]


def total(owner: Tensor, energies: Tensor, count: int = 3) -> Tensor:
    """The sum of each of so many poses."""
    return energies.new_zeros(count).index_add(0, owner, energies)


def block(p: Parts, h: Tensor, b: Batch) -> Tensor:
    """One layer of message passing."""
    sent = torch.tanh(p.mix(h[b.sender] * h.index_select(0, b.receiver)))
    return h + torch.zeros_like(h).scatter_add(0, wide(b.receiver, sent), sent)


def graph(p: Parts, *, checkpointed: bool = False, b: Batch | None = None) -> Tensor:
    """Two layers of message passing, and the sum of each pose."""
    b = b or batch([3, 1, 4])
    h = torch.tanh(p.lift(b.atoms))
    h = checkpoint(block, p, h, b, use_reentrant=False) if checkpointed else block(p, h, b)
    return total(b.owner, p.energy(block(p, h, b)))


def _at(*entries: int) -> Tensor:
    return torch.tensor(entries)


def _within(owner: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Numbers of rows of one pose for each entry along dimension 0, and these poses."""
    poses = numbers(int(owner.max()) + 1, shape[0])
    rows_of = [(owner == pose).nonzero()[:, 0] for pose in poses]
    found = torch.stack([own[numbers(len(own), *shape[1:])] for own in rows_of])
    return found, poses


def _differs_along_features(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5, D)
    return total(poses, p.energy(p.rows(7).gather(0, index)))


def _spread_along_features(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5, D)
    pieces = torch.stack([p.rows(1)[0] for _ in poses])
    return total(OWNER, p.energy(torch.zeros(7, D).double().scatter_add(0, index, pieces)))


def _narrower(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    some = p.rows(7).gather(0, index.unsqueeze(1).expand(-1, 2))
    return total(poses, p.energy(some.repeat(1, 2)))


def _put(*, accumulate: bool) -> Network:
    return lambda p: p.energy(
        p.rows(4).index_put((_at(0, 2, 0, 3, 2),), p.rows(5), accumulate=accumulate)
    )


def _put_by_mask(p: Parts) -> Tensor:
    h = p.rows(4).clone()
    h[torch.tensor([True, False, True, True])] = p.rows(3)
    return p.energy(h)


def _put_in_columns(p: Parts) -> Tensor:
    h = p.rows(4).T.clone()
    h[:, _at(2, 0, 2)] += p.rows(3).T
    return p.energy(h.T)


def _token_put(p: Parts) -> Tensor:
    h = p.rows(5).clone()
    h[torch.rand(5) < 0.5] = p.token
    return p.energy(h)


def _seconds(p: Parts) -> Tensor:
    """Poses lie second, `[T, m]`, and are picked along that dimension."""
    sums = p.rows(2, 4)[:, _at(2, 0, 3, 1, 0)].index_select(1, _at(3, 1, 0, 2)).sum((0, 2))
    return sums.sin()


def _seconds_added(p: Parts) -> Tensor:
    grid = p.energy(p.rows(2, 7))
    return grid.new_zeros(2, 3).index_add(-1, OWNER, grid).sin().sum(0)


def _heads_merged(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    heads = torch.einsum("nd,hde->nhe", p.rows(7), p.table.reshape(3, 2, 2).repeat(1, 2, 1))
    return total(poses, p.energy(heads[index].reshape(5, 6)[:, :D]))


def _heads_split(p: Parts) -> Tensor:
    index, poses = _within(OWNER, 5)
    heads = p.rows(7)[index].view(5, 2, 2)
    return total(poses, torch.softmax(heads @ heads.mT, dim=-1).flatten(1).square().sum(1))


def _rows_split(p: Parts) -> Tensor:
    """`[m T, d]` to `[m, T, d]`, behind and before something indexed."""
    merged = p.rows(6)[_at(1, 0, 3, 2, 5, 4)].view(3, 2, D).cumsum(1).view(6, D)
    return p.energy(merged[_at(4, 5, 0, 1, 2, 3)].view(3, 2, D).sum(1))


def _padded(p: Parts) -> Tensor:
    dense, mask = to_dense_batch(p.rows(7)[OWNER.argsort()], OWNER.sort().values)
    return (p.energy(dense) * mask).sum(1)


def _unpadded(p: Parts) -> Tensor:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    owner = mask.nonzero()[:, 0]
    flat = p.rows(3, 3).flatten(0, 1)[mask.flatten().nonzero()[:, 0]]
    return total(owner, p.energy(flat)) + total(owner, p.energy(p.rows(3, 3)[mask]))


def _by_sorting(p: Parts) -> Tensor:
    h = p.rows(7)[OWNER.argsort()]
    ends = torch.bincount(OWNER).cumsum(0)
    return torch.stack([p.energy(part).sum() for part in h.tensor_split(ends[:-1].tolist())])


def _repeated(p: Parts) -> Tensor:
    counts = _at(2, 0, 3)
    each = p.rows(3).repeat_interleave(counts, dim=0)
    return total(torch.arange(3).repeat_interleave(counts), p.energy(each * p.rows(5)))


def _forces(p: Parts) -> Tensor:
    """Predictions that are derivatives: the graph of a backward, which indexes the other way."""
    b = batch([3, 1, 4])
    atoms = b.atoms.requires_grad_()
    apart = atoms[b.sender] - atoms.index_select(0, b.receiver)
    energies = p.energy(torch.tanh(p.lift(apart)))
    (force,) = torch.autograd.grad(energies.sum(), atoms, create_graph=True)
    return total(b.owner, force.square().sum(1))


def _mapped(p: Parts) -> Tensor:
    def one(x: Tensor, index: Tensor) -> Tensor:
        h = torch.tanh(p.lift(x))
        return p.energy(torch.zeros_like(h).index_add(0, index, h[index.flip(0)])).sum()

    return torch.func.vmap(one)(double(3, 5, 3), numbers(5, 3, 5))


def _sparse(p: Parts) -> Tensor:
    b = batch([3, 1, 4])
    matrix = torch.zeros(8, 8).double()
    matrix[b.receiver, b.sender] = 1
    with torch.sparse.check_sparse_tensor_invariants():
        matrix = matrix.to_sparse()
    return total(b.owner, p.energy(torch.sparse.mm(matrix, torch.tanh(p.lift(b.atoms)))))


def _other_operators(p: Parts) -> Tensor:
    """Those that pick or put by number too, and have no rule."""
    h = p.rows(3)
    h = h.index_copy(0, _at(2, 0), p.rows(2)).index_fill(0, _at(1), 0.5) * h
    h = h.masked_scatter(torch.tensor([[True], [False], [True]]), p.rows(2))
    h = h.scatter(1, torch.tensor([[0], [1], [2]]), p.rows(3)[:, :1])
    return p.energy(h.put(_at(0, 5), p.rows(1)[0, :2])).take(_at(2, 0, 1))


def _tokens(p: Parts) -> Tensor:
    """A parameter picked from by number, one added to by number."""
    start = p.token.expand(3, D).index_add(0, OWNER, p.table[OWNER] * p.rows(7))
    return p.energy(start + torch.tanh(p.table).gather(0, numbers(3, 3, D)))


def _one_row_for_all(*, accumulate: bool) -> Network:
    """A vector is put into as many rows as it has numbers."""
    return lambda p: p.energy(
        p.rows(6).index_put((_at(0, 2, 3, 5),), torch.tanh(p.token), accumulate=accumulate)
    )


def _one_matrix_for_all(p: Parts) -> Tensor:
    """Poses lie second, as many as features, and meet in no number."""
    return p.energy(p.rows(3, D).index_put((_at(0, 2),), p.rows(D), accumulate=True)).sum(0)


def _one_row_of_poses(p: Parts) -> Tensor:
    grid = p.energy(p.rows(2, 5)).clone()
    grid[:, _at(3, 0)] = p.energy(p.rows(2))  # in both rows
    return grid.sin().sum(0)


def _features_of_no_edges(p: Parts) -> Tensor:
    none, h = torch.zeros(0).long(), p.rows(0)
    h = h.scatter_add(1, none.reshape(0, 1).expand(0, D), h.sin())
    return p.energy(p.rows(3).index_add(0, none, h))


def _no_features(p: Parts) -> Tensor:
    index = _at(1, 0, 2)
    none = p.rows(3)[:, :0].gather(0, index.unsqueeze(1).expand(3, 0))
    return p.energy(p.rows(3)[index]) + none.sum(1)


# name: networks whose poses stay apart, in rows of any kind
APART: dict[str, Network] = {
    "features picked": lambda p: p.energy(p.rows(5)[:, _at(0, 2, 2, 1)]),
    "rows and features picked": lambda p: p.energy(p.rows(5)[torch.randperm(5)][:, numbers(D, D)]),
    "features picked row by row": lambda p: p.energy(p.rows(5).gather(1, numbers(D, 5, D))),
    "features added up row by row": lambda p: p.energy(
        p.rows(5).scatter_add(1, numbers(D, 5, D), p.rows(5))
    ),
    "features of fewer rows": lambda p: p.energy(
        p.rows(5).scatter_add(1, numbers(D, 3, 2), torch.ones(5, D).double())
    ),
    "numbers differ along features": _differs_along_features,
    "sums differ along features": _spread_along_features,
    "numbers for some features": _narrower,
    "duplicates put": _put(accumulate=False),
    "duplicates added up": _put(accumulate=True),
    "put by a mask": _put_by_mask,
    "put in columns": _put_in_columns,
    "a token put": _token_put,
    "tokens": _tokens,
    "a graph": graph,
    "a checkpointed block": lambda p: graph(p, checkpointed=True),
    "poses second": _seconds,
    "poses second, by gather": lambda p: (
        p.energy(p.rows(2, 4)).gather(1, _at(3, 1, 0, 2).expand(2, -1)).sin().sum(0)
    ),
    "poses second, added up": _seconds_added,
    "heads merged": _heads_merged,
    "heads split": _heads_split,
    "rows split": _rows_split,
    "padded": _padded,
    "unpadded": _unpadded,
    "split by sorting": _by_sorting,
    "repeated": _repeated,
    "segments": lambda p: p.energy(
        torch.segment_reduce(p.rows(7), "max", lengths=_at(2, 1, 4), axis=0)
    ),
    "forces": _forces,
    "vmap": _mapped,
    "a sparse matrix": _sparse,
    "other operators": _other_operators,
    "poses in another order": lambda p: p.energy(p.rows(5))[torch.randperm(5)],
    "some poses": lambda p: p.energy(p.rows(5))[torch.randperm(5)[:3]],
    "some poses, from the end": lambda p: p.energy(p.rows(5)).index_select(0, _at(4, 1)),
    "poses by gather": lambda p: p.energy(p.rows(5)).gather(0, torch.randperm(5)),
    "several numbers per pose": lambda p: p.mix(p.rows(7))[OWNER.argsort()[:3]],
    "several numbers per pose, second": lambda p: p.mix(p.rows(7)).T[:, _at(6, 1, 2)],
    "no edges": lambda p: graph(p, b=batch([1, 1, 1])),
    "no edges of every pose": lambda p: p.energy(p.rows(3) + p.rows(0).view(3, 0, D).sum(1)),
    "features of no edges": _features_of_no_edges,
    "no features": _no_features,
    "one row added to many": _one_row_for_all(accumulate=True),
    "one row put into many": _one_row_for_all(accumulate=False),
    "one matrix added to many": _one_matrix_for_all,
    "one row of poses put into many": _one_row_of_poses,
    "no dimensions, added": lambda p: p.energy(p.rows(3)).scatter_add(
        0, torch.tensor(1), p.energy(p.rows())
    ),
    "a mask of bytes": lambda p: p.energy(p.rows(3) * p.table[torch.ones(3, dtype=torch.uint8)]),
    "atoms of one pose": lambda p: graph(p, b=batch([0, 7, 0])),
}


def _across(p: Parts, sender: list[int], receiver: list[int]) -> Tensor:
    """A graph of atoms of three poses, with these edges."""
    h, s, r = p.rows(7), _at(*sender), _at(*receiver)
    return total(OWNER, p.energy(h + torch.zeros_like(h).index_add(0, r, p.mix(h[s]))))


def _one_feature_across(p: Parts) -> Tensor:
    index = torch.arange(4).unsqueeze(1).repeat(1, D)
    index[3, -1] = 0
    return p.energy(p.rows(4).gather(0, index))


def _two_ways(p: Parts) -> Tensor:
    h = p.rows(4)
    return p.energy(h[_at(0, 1, 2, 3)] + h.index_select(0, _at(0, 1, 3, 2)))


def _checkpointed_across(p: Parts) -> Tensor:
    b, atoms = batch([3, 1, 4]), torch.arange(8)
    return graph(p, checkpointed=True, b=b._replace(sender=atoms, receiver=atoms.flip(0)))


def _outputs_share(p: Parts) -> Tensor:
    picked = p.energy(p.rows(6))[_at(0, 1, 2, 2, 3, 0, 5)]
    return torch.zeros(3).double().scatter_add(0, OWNER, picked)


# name: networks in which poses meet
SHARED: dict[str, Network] = {
    "an atom of two poses": lambda p: total(OWNER, p.energy(p.rows(6)[[0, 1, 2, 3, 4, 5, 5]])),
    "an atom of two poses, by gather": lambda p: total(
        OWNER, p.energy(p.rows(6)).gather(0, _at(0, 1, 2, 3, 4, 5, 5))
    ),
    "an atom of all poses": lambda p: p.energy(p.rows(2)[torch.zeros(4).long()] * p.rows(4)),
    "an edge between poses": lambda p: _across(p, [1, 4, 0, 2], [4, 1, 5, 0]),
    "two layers of edges": lambda p: _across(p, [1, 4, 3, 2], [4, 1, 0, 3]) + _across(p, [0], [3]),
    "edges between poses in a checkpoint": _checkpointed_across,
    "no dimensions, picked by all": lambda p: (
        p.energy(p.rows(3)) + p.energy(p.rows()).gather(0, torch.zeros(3).long())
    ).sin(),
    "a feature of another pose": _one_feature_across,
    "two uses, two owners": _two_ways,
    "an output of another": lambda p: (y := p.energy(p.rows(4))) + y[_at(0, 2, 1, 3)],
    "outputs that share atoms": _outputs_share,
    "outputs asked for twice": lambda p: p.energy(p.rows(4))[_at(3, 0, 0, 1)],
    "several numbers, asked for twice": lambda p: p.mix(p.rows(4))[_at(3, 0, 0, 1)],
}
