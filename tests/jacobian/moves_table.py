"""Moves of rows whose owners are known, and operators on tensors of any shape, all by number."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.utils import scatter

from tests.drawing import double
from tests.jacobian.indexed_table import numbers

__all__ = ["MOVES", "OPERATORS", "Leaves"]

Owned = tuple[Tensor, Tensor]
Move = Callable[[Tensor, Tensor], Owned]


def _picked(x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    index = numbers(len(owner), int(numbers(7))) if len(owner) else owner
    return index, owner[index]


def _along_rows(function: Callable[[Tensor, Tensor], Tensor]) -> Move:
    def step(x: Tensor, owner: Tensor) -> Owned:
        index, owners = _picked(x, owner)
        return function(x, index), owners

    return step


def _into_rows(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Move:
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
    return int(places[numbers(len(places))])


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


def _same(function: Callable[[Tensor], Tensor]) -> Move:
    return lambda x, owner: (function(x), owner)


def _per_row(x: Tensor) -> Tensor:
    return x.gather(2, numbers(x.shape[2], *x.shape)).scatter_add(0, numbers(len(x), *x.shape), x)


# name: from rows `[A, R, B]` and the owners of the R to others
MOVES: dict[str, Move] = {
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


class Leaves(nn.Module):
    """Activations of any shape, of a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = nn.ParameterList()

    def new(self, shape: list[int]) -> Tensor:
        self.leaves.append(nn.Parameter(double(*shape)))
        return torch.tanh(self.leaves[-1])


def _sized(shape: list[int], dim: int, size: int) -> list[int]:
    return [*shape[:dim], size, *shape[dim + 1 :]]


def _each(shape: list[int], dim: int, below: int) -> Tensor:
    """A number for every element, or one for all that differ in other dimensions only."""
    alone = [size if d == dim else 1 for d, size in enumerate(shape)]
    return numbers(below, *(alone if torch.rand(()) < 0.5 else shape)).expand(shape)


def _broadcast(shape: list[int]) -> list[int]:
    """A shape that broadcasts to this one."""
    some = [1 if torch.rand(()) < 0.2 else size for size in shape]
    return some[int(numbers(len(some) + 1)) :]


def _larger(shape: list[int]) -> list[int]:
    return [size + int(numbers(2)) for size in shape]


def _set(m: Leaves, shape: list[int], dim: int) -> Tensor:
    x = m.new(shape).clone()
    place = (slice(None),) * dim
    if torch.rand(()) < 0.3:
        mask = torch.rand(shape[dim]) < 0.7
        x[(*place, mask)] = m.new(_broadcast(_sized(shape, dim, int(mask.sum()))))
    else:
        x[(*place, numbers(shape[dim], 3))] = m.new(_broadcast(_sized(shape, dim, 3)))
    return x


def _put_two(m: Leaves, shape: list[int], dim: int) -> Tensor:
    """With numbers for one dimension or for two."""
    places = tuple(numbers(size, 3) for size in shape[: 1 + dim % 2])
    values = m.new(_broadcast([3, *shape[len(places) :]]))
    return m.new(shape).index_put(places, values, accumulate=bool(numbers(2)))


# name: from shape and dimension to what the operator makes of leaves
OPERATORS: dict[str, Callable[[Leaves, list[int], int], Tensor]] = {
    "index_select": lambda m, s, d: m.new(s).index_select(d - len(s), numbers(s[d], 3)),
    "brackets": lambda m, s, d: m.new(s)[(slice(None),) * d + (numbers(s[d], 4) - s[d],)],
    # Written out: torch puts expanded numbers in wrong places of a tensor that is larger otherwise.
    "gather": lambda m, s, d: m.new(_larger(s)).gather(
        d, _each(_sized(s, d, 3), d, s[d]).contiguous()
    ),
    "index_add": lambda m, s, d: m.new(s).index_add(d, numbers(s[d], 3), m.new(_sized(s, d, 3))),
    "scatter_add": lambda m, s, d: m.new(_larger(s)).scatter_add(
        d, _each(_sized(s, d, 4), d, s[d]).contiguous(), m.new(_sized(s, d, 4))
    ),
    "scatter_reduce": lambda m, s, d: m.new(s).scatter_reduce(
        d, _each(_sized(s, d, 4), d, s[d]), m.new(_sized(s, d, 4)), "amax"
    ),
    "index_put": _put_two,
    "set": _set,
}
