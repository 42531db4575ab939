"""Law 3 on networks nobody thought of: drawn from a grammar of layers, compared with autograd.

Between the layers a tensor is `[m, T, d]`: m poses of T rows. Every step takes one and gives one;
steps that rearrange poses draw anew in every forward, so that no layout can be learnt by heart.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from posegrad import Engine
from tests.models import Step


def _free(*shape: int) -> Tensor:
    return 1 + 0.3 * torch.randn(shape)


def _matrix(*shape: int) -> Tensor:
    return 0.5 * torch.randn(shape)


def _flattened(x: Tensor, module: nn.Module) -> Tensor:
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _on_left(x: Tensor, w: Tensor) -> Tensor:
    return (w @ x.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])


def _channels_first(x: Tensor, module: nn.Module) -> Tensor:
    return module(x.mT).mT


def _pose_second(x: Tensor, module: nn.Module) -> Tensor:
    return module(x.transpose(0, 1).contiguous()).transpose(0, 1)


def _residual(x: Tensor, module: nn.Module) -> Tensor:
    return x + torch.tanh(module(x))


def _branches(x: Tensor, narrow: nn.Module, wide: nn.Module) -> Tensor:
    return torch.cat([narrow(x), wide(torch.tanh(x))], dim=-1)


def _reused(x: Tensor, module: nn.Module) -> Tensor:
    return module(torch.tanh(module(torch.tanh(module(x)))))


def _tied_transposed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(linear(x, w, b)) @ w


def _tied_twice(x: Tensor, module: nn.Linear) -> Tensor:
    return module(x) + linear(torch.tanh(x), module.weight)


def _normalised_too(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, w) + linear(torch.tanh(x), w / w.norm())


def _attention(x: Tensor, project: nn.Module) -> Tensor:
    q, k, v = project(x).chunk(3, dim=-1)
    return x + torch.softmax(q @ k.mT, dim=-1) @ v


def _pooled(x: Tensor) -> Tensor:
    window = 2 if x.shape[1] % 2 == 0 else x.shape[1]
    return x.unflatten(1, (-1, window)).mean(2)


def _ragged(x: Tensor) -> Tensor:
    """Every row goes to any pose, so a pose may have several or none."""
    rows = x.flatten(0, 1)
    owners = torch.randint(len(x), (len(rows),))
    return x.new_zeros(len(x), x.shape[2]).index_add(0, owners, rows).unsqueeze(1)


WELL_CONDITIONED = 0.1  # a smaller eps leaves two normalised features no gradient but rounding


def _dealt(x: Tensor) -> Tensor:
    """The rows of all poses, dealt out one by one like cards."""
    return x.reshape(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)


def _by_matrix(x: Tensor) -> Tensor:
    """A permutation that the graph alone cannot tell from a mixture."""
    return (torch.eye(len(x)).double()[torch.randperm(len(x))] @ x.flatten(1)).view_as(x)


# name: from the widths d of x and p of the result to the step.
STEPS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "linear without bias": lambda d, p: nn.Linear(d, p, bias=False),
    "linear, in-place activation": lambda d, p: nn.Sequential(nn.Linear(d, p), nn.SiLU(True)),
    "flattened linear": lambda d, p: Step(_flattened, nn.Linear(d, p)),
    "weight on the left": lambda d, p: Step(_on_left, w=_matrix(p, d)),
    "pose second": lambda d, p: Step(
        _pose_second, nn.Sequential(nn.Linear(d, p), nn.LayerNorm(p, WELL_CONDITIONED))
    ),
    "branches": lambda d, p: Step(_branches, nn.Linear(d, 1), nn.Linear(d, p - 1)),
    "tied twice": lambda d, p: Step(_tied_twice, nn.Linear(d, p)),
    "low rank": lambda d, p: Step(lambda x, a, b: x @ (a @ b), a=_matrix(d, 1), b=_matrix(1, p)),
    "masked": lambda d, p: Step(lambda x, w: x @ (w * torch.ones(d, p).triu()), w=_matrix(d, p)),
    "normalised too": lambda d, p: Step(_normalised_too, w=_matrix(p, d)),
    "convolution": lambda d, p: Step(_channels_first, nn.Conv1d(d, p, 3, padding=1)),
    "circular convolution": lambda d, p: Step(
        _channels_first, nn.Conv1d(d, p, 3, padding=1, padding_mode="circular", bias=False)
    ),
}
SQUARE_STEPS: dict[str, Callable[[int], nn.Module]] = {
    "tanh": lambda d: nn.Tanh(),
    "layer norm": lambda d: nn.LayerNorm(d, eps=WELL_CONDITIONED),
    "group norm": lambda d: Step(_channels_first, nn.GroupNorm(1, d, eps=WELL_CONDITIONED)),
    "depthwise": lambda d: Step(_channels_first, nn.Conv1d(d, d, 2, padding=1, groups=d)),
    "scale and bias": lambda d: Step(lambda x, s, b: x * s + b, s=_free(d), b=_free(d)),
    "one scale": lambda d: Step(lambda x, s, b: s * x - 2 * b, s=_free(), b=_free(1)),
    "quotient": lambda d: Step(lambda x, s, b: (b - x) / s, s=_free(d), b=_free(1, d)),
    "residual": lambda d: Step(_residual, nn.Linear(d, d)),
    "reused": lambda d: Step(_reused, nn.Linear(d, d)),
    "tied, transposed": lambda d: Step(_tied_transposed, w=_matrix(5, d), b=_matrix(5)),
    "attention": lambda d: Step(_attention, nn.Linear(d, 3 * d)),
    "permuted": lambda d: Step(lambda x: x[torch.randperm(len(x))]),
    "pooled": lambda d: Step(_pooled),
    "ragged": lambda d: Step(_ragged),
    "dealt": lambda d: Step(_dealt),
    "permuted by a matrix": lambda d: Step(_by_matrix),
    "turned over": lambda d: Step(lambda x: x.flip(0)),
    "cut": lambda d: Step(lambda x: torch.cat(x.tensor_split(2)[::-1])),
    "unbound": lambda d: Step(lambda x: torch.stack(x.unbind(0)[::-1])),
    "doubled": lambda d: Step(lambda x: torch.stack([x, 2 * x], 1).flatten(1, 2)),
    "repeated": lambda d: Step(lambda x: x.repeat(1, 2, 1)),
    "shifted": lambda d: Step(lambda x: x.roll(1, 1) - x.amax(1, keepdim=True)),
    "subset": lambda d: Step(lambda x: x[torch.randperm(len(x))[: max(1, len(x) - 1)]]),
    "centred": lambda d: Step(lambda x: x - x.mean(0)),
    "shared": lambda d: Step(lambda x: torch.softmax(x, 0)),
    "cumulated": lambda d: Step(lambda x: x.cumsum(0)),
    "sorted": lambda d: Step(lambda x: x.sort(0).values),
}
MIXING = {"convolution", "circular convolution", "depthwise", "group norm", "attention"}
MIXING |= {"shifted", "doubled", "repeated"}  # a row goes into several
DEALING = {"ragged", "dealt"}
COUPLING = {"centred", "shared", "cumulated", "sorted"}

# name: from `[m, K]` to the output.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda y: y[:, 0],
    "column": lambda y: y[:, :1],
    "vector": lambda y: y,
    "pose second": lambda y: y.mT,
    "matrix": lambda y: y.unsqueeze(1) * torch.tensor([1.0, -2.0]).reshape(1, 2, 1),
    "loss": lambda y: y.square().sum(1),
    "total": lambda y: y.sum(),
}


class Network(nn.Module):
    """Front end, steps, sum over the rows of a pose, head."""

    def __init__(self, steps: list[nn.Module], first: int, last: int, vocabulary: int) -> None:
        super().__init__()
        self.front = nn.Embedding(vocabulary, first, padding_idx=0) if vocabulary else None
        self.lift = nn.Linear(2, first)
        self.steps = nn.Sequential(*steps)
        self.head = nn.Linear(last, 3)

    def forward(self, poses: Tensor) -> Tensor:
        x = self.front(poses[..., 0].abs().long().clamp(max=4)) if self.front else self.lift(poses)
        return self.head(torch.tanh(self.steps(x).sum(1)))


@dataclass
class Sentence:
    """A drawn network, and what is asked of it."""

    steps: list[tuple[str, int]]
    first: int
    vocabulary: int
    output: str
    counts: tuple[int, int]
    rows: int
    seed: int
    check: str

    @property
    def may_couple(self) -> bool:
        """Whether poses may depend on each other, or on rows that others own."""
        names = [name for name, _ in self.steps]
        mixed = [i for i, name in enumerate(names) if name in MIXING]
        dealt = [i for i, name in enumerate(names) if name in DEALING]
        scattered = bool(mixed and dealt and mixed[0] < dealt[-1])
        fewest = min(self.counts) - names.count("subset")
        lone = self.output == "pose second" and fewest <= 1  # [K, 1] reads as K poses
        return bool(COUPLING & {*names}) or scattered or lone

    def network(self) -> Network:
        torch.manual_seed(self.seed)
        width, steps = self.first, []
        for name, wanted in self.steps:
            new = SQUARE_STEPS[name](width) if name in SQUARE_STEPS else STEPS[name](width, wanted)
            width = width if name in SQUARE_STEPS else wanted
            steps.append(new)
        return Network(steps, self.first, width, self.vocabulary).double()


@st.composite
def sentences(draw: st.DrawFn) -> Sentence:
    rare = draw(st.integers(0, 7)) == 0
    names = [name for name in (*STEPS, *SQUARE_STEPS) if name not in COUPLING or rare]
    step = st.tuples(st.sampled_from(names), st.integers(2, 4))
    sentence = Sentence(
        steps=draw(st.lists(step, min_size=1, max_size=6)),
        first=draw(st.integers(2, 4)),
        vocabulary=draw(st.sampled_from([0, 0, 5])),
        output=draw(st.sampled_from(sorted(OUTPUTS))),
        counts=(draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        rows=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**16)),
        check="first",
    )
    if not sentence.may_couple:
        sentence.check = draw(st.sampled_from(["first", "never"]))
    return sentence


def _rows(output: Tensor, leaves: list[nn.Parameter]) -> Tensor:
    """J by plain autograd, one backward for each row."""
    return torch.stack([_row(output, leaves, unit) for unit in torch.eye(output.numel()).double()])


def _row(output: Tensor, leaves: list[nn.Parameter], weights: Tensor) -> Tensor:
    found = torch.autograd.grad(
        output, leaves, weights.reshape(output.shape), retain_graph=True, allow_unused=True
    )
    pairs = zip(found, leaves, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    atol = 1e-10 * max(1e-3, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def _assert_exact(engine: Engine, network: Network, output: Tensor) -> None:
    leaves = list(network.parameters())
    expected = _rows(output, leaves)
    w = torch.randn(output.shape, dtype=torch.float64)
    combined = _row(output, leaves, w)

    J = engine.jacobian(output)

    _assert_equal(J.matrix(), expected)
    _assert_equal(torch.cat([g.flatten() for g in J.combine(w).values()]), combined)
    gramian = (expected @ expected.mT).reshape(output.shape + output.shape)
    order = (*range(output.ndim), *reversed(range(output.ndim, 2 * output.ndim)))
    _assert_equal(J.gramian(), gramian.permute(order))
    _assert_equal(J.norms(), expected.norm(dim=1).reshape(output.shape))


def _check(sentence: Sentence) -> None:
    network = sentence.network()
    engine = Engine(network, check=sentence.check)
    for count in sentence.counts:
        poses = 2 * torch.randn(count, sentence.rows, 2, dtype=torch.float64)
        output = OUTPUTS[sentence.output](network(poses))
        with warnings.catch_warnings() if sentence.may_couple else nullcontext():
            if sentence.may_couple:
                warnings.filterwarnings("ignore", "The predictions of different poses depend")
            _assert_exact(engine, network, output)


@settings(max_examples=60)
@given(sentences())
def test_any_network_agrees_with_autograd(sentence: Sentence) -> None:
    _check(sentence)


@pytest.mark.parametrize("output", sorted(OUTPUTS))
@pytest.mark.parametrize("name", [*STEPS, *SQUARE_STEPS])
def test_every_step_alone_agrees_with_autograd(name: str, output: str) -> None:
    _check(Sentence([(name, 3)], 2, 0, output, (3, 3), 2, 0, "first"))


class Graphs(nn.Module):
    """A message-passing network on a ragged batch: rows are atoms and edges."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.message = nn.Linear(2, 4), nn.Linear(8, 4)
        self.update, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 1)

    def forward(self, atoms: Tensor, edges: Tensor, owners: Tensor, count: int) -> Tensor:
        h = torch.tanh(self.lift(atoms))
        messages = torch.tanh(self.message(torch.cat([h[edges[0]], h[edges[1]]], dim=1)))
        h = h + self.update(torch.zeros_like(h).index_add(0, edges[1], messages))
        pooled = h.new_zeros(count, 4).index_add(0, owners, h)
        return self.head(torch.tanh(pooled)).squeeze(1)


@pytest.mark.parametrize("check", ["first", "never"])
@given(batches=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=5), max_size=3))
def test_stated_owners_are_those_that_are_found(check: str, batches: list[list[int]]) -> None:
    torch.manual_seed(0)
    network = Graphs().double()
    engine = Engine(network, check=check)
    for sizes in ([2, 1], *batches):
        owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        edges = (owners[:, None] == owners).nonzero().T
        edges = edges[:, torch.rand(edges.shape[1]) < 0.5]  # some as many as atoms, or as poses
        atoms = torch.randn(len(owners), 2, dtype=torch.float64)
        output = network(atoms, edges, owners, len(sizes))
        expected = _rows(output, list(network.parameters()))
        for stated in (None, [owners, owners[edges[0]]]):
            J = engine.jacobian(output, pose_index=stated, retain_graph=True)
            _assert_equal(J.matrix(), expected)


@pytest.mark.parametrize("name", [name for name in (*STEPS, *SQUARE_STEPS) if name not in COUPLING])
@pytest.mark.parametrize(("output", "dimension"), [("vector", 0), ("pose second", 1), ("loss", 0)])
def test_a_stated_batch_dimension_is_the_one_that_is_found(
    name: str, output: str, dimension: int
) -> None:
    network = Sentence([(name, 3)], 2, 0, output, (4, 4), 2, 0, "first").network()
    predictions = OUTPUTS[output](network(torch.randn(4, 2, 2, dtype=torch.float64)))
    expected = _rows(predictions, list(network.parameters()))
    for batch_dim in ("auto", None, dimension):
        engine = Engine(network, batch_dim=batch_dim)
        _assert_equal(engine.jacobian(predictions, retain_graph=True).matrix(), expected)
