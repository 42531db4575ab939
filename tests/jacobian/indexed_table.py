"""Ways to pick rows and to add them up by number, and what stands between them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.utils import scatter, softmax

from tests.drawing import double
from tests.models import Step

__all__ = [
    "ADDS",
    "BATCHES",
    "LAYERS",
    "OUTPUTS",
    "PICKS",
    "Batch",
    "D",
    "Network",
    "Spelling",
    "batch",
    "numbers",
    "wide",
]

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
    return Batch(double(len(owner), 3), owner, sender, receiver, len(sizes))


# sizes, share of edges, and loops; the last has as many poses as atoms, edges and features
BATCHES = [([3, 1, 2], 0.6, False), ([1, 1, 1, 1], 1.0, True)]


def numbers(below: int, *shape: int) -> Tensor:
    """Any numbers below this one."""
    return torch.randint(below, shape)


def wide(index: Tensor, x: Tensor) -> Tensor:
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
    "gather, expanded": lambda x, i: x.gather(0, wide(i, x)),
    "gather, written out": lambda x, i: x.gather(0, wide(i, x).contiguous()),
    "gather of columns": lambda x, i: x.T.gather(-1, wide(i, x).T).T,
    "gather, sparse": lambda x, i: (x[i] + x.gather(0, wide(i, x), sparse_grad=True)) / 2,
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
    return lambda into, i, x: into.scatter_reduce(0, wide(i, x), x, how, include_self=include)


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
    "scatter_add, expanded": lambda into, i, x: into.scatter_add(0, wide(i, x), x),
    "scatter_add to columns": lambda into, i, x: into.T.scatter_add(-1, wide(i, x).T, x.T).T,
    "scatter_add_, written out": (
        lambda into, i, x: into.clone().scatter_add_(0, wide(i, x).contiguous(), x)
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
