"""Parameters whose rows come in several parts: many uses, and poses scored in chunks."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Clip, Engine, PoseJacobian
from posegrad.jacobian import Arrangement, Block, Factors, Layout
from posegrad.jacobian._joining import Joining
from posegrad.testing import peak_live_bytes
from tests import reference
from tests.device import DEVICE
from tests.drawing import times
from tests.jacobian.forms_table import CASES, Case, alive, owners

F64 = torch.float64

Draft = tuple[nn.Module, Callable[[], Tensor]]
"""A model, and what computes its output anew."""


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, Tensor]]]:
    """M, and of each use its first pose, the number of its poses, and the owners of its rows."""
    each, uses, end = [draw(owners()) for _ in range(draw(st.integers(1, 3)))], [], 0
    for count, owner in each:
        for _ in range(draw(st.integers(1, 2))):
            uses.append((end, count, owner))
        end += count if draw(st.booleans()) else 0  # else the next uses are of the same poses
    return max(start + count for start, count, _ in uses), uses


# An activation has one use: itself.
USED = [name for name in CASES if not name.startswith("activation")]


@pytest.mark.parametrize("name", USED)
@times(0.4)
@given(drawn=pieces(), components=st.sampled_from([None, 2]))
def test_parts_joined_are_their_sum(
    name: str, drawn: tuple[int, list[tuple[int, int, Tensor]]], components: int | None
) -> None:
    count, uses = drawn
    k, parts = components or 1, []
    for start, poses, owner in uses:
        case = CASES[name](len(owner))
        layout = Layout.along(poses, case.dim, owner)
        cotangents = tuple([alive(i * case.cotangent, layout) for i in range(1, k + 1)])
        shape = torch.Size([poses]) if components is None else torch.Size([poses, k])
        arrangement = Arrangement(shape, None if components is None else 0)
        parts.append(Factors("a use", start * k, case.form, layout, arrangement, cotangents))
    _assert_joins(parts, count * k)


def _assert_joins(parts: Sequence[Factors], count: int, left: int = 1) -> None:
    """What is made of them has their sum for its rows, in so many parts."""
    parameter = torch.zeros(parts[0].form.shape, dtype=F64)
    separate = Block.of(parameter, count, parts)
    joined = separate.as_one(Joining())
    assert len(joined.parts) == left or not parts[0].opened().form.positions
    expected = separate.rows()
    torch.testing.assert_close(joined.rows(), expected, rtol=1e-10, atol=1e-10)
    J = PoseJacobian(torch.zeros(count, dtype=F64), {"p": parameter}, {"p": separate})
    flat, weights = expected.reshape(count, -1), torch.linspace(-1, 2, count, dtype=F64)
    torch.testing.assert_close(
        J.combine(weights)["p"].reshape(-1), weights @ flat, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(J.norms(), flat.norm(dim=1), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(J.gramian(), flat @ flat.mT, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("linear", "linear, flipped", "linear, on the left"), 2),  # that one has another scale
        (("linear", "linear, flipped"), 1),
        (("linear, wide, on the left", "linear, wide, on the left"), 1),
        (("embedding", "embedding bag"), 2),  # they differ in their padding
        (("bias", "bias, times a number"), 2),
    ],
)
def test_a_parameter_may_enter_in_several_ways(names: tuple[str, ...], left: int) -> None:
    torch.manual_seed(0)
    cases = [_square(CASES[name](6), name) for name in names]
    layouts = [Layout.along(3, case.dim, torch.arange(6) // 2) for case in cases]
    pairs = zip(cases, layouts, strict=True)
    shape = Arrangement(torch.Size([3]), None)
    parts = [Factors("a use", 0, c.form, layout, shape, (c.cotangent,)) for c, layout in pairs]
    _assert_joins(parts, 3, left)


def _square(case: Case, name: str) -> Case:
    """Of transposes the parameter has the shape of the others."""
    if name != "linear, flipped":
        return case
    a, b = torch.randn(6, 2, dtype=F64), torch.randn(6, 3, dtype=F64)
    form = type(case.form)(
        torch.Size([2, 3]), type(case.form.factors()[0]).of(a, "it"), True, False, 1.0
    )
    return Case(form, b, 0)


def _siamese() -> Draft:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(2, 5, 3, dtype=F64)
    return net, lambda: (net(x) - net(y)).square().sum(1)


def _lengths() -> Draft:
    net = nn.Linear(3, 4).double()
    x, y, z = torch.randn(5, 3), torch.randn(5, 6, 3), torch.randn(2, 5, 3)
    x, y, z = x.double(), y.double(), z.double()
    return net, lambda: net(x).sin().sum(1) + net(y).cos().sum((1, 2)) + net(z).exp().sum((0, 2))


def _ragged() -> Draft:
    net, owner = nn.Linear(3, 4).double(), torch.tensor([2, 0, 0, 1, 2, 2, 2])
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    total = torch.zeros(4, dtype=F64)  # pose 3 has no atom
    return net, lambda: total.index_add(0, owner, net(x).sin().sum(1)) + net(y).cos().sum(1)


def _autoencoder() -> Draft:
    layer, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=F64)
    return layer, lambda: (layer(x).sin() @ layer.weight - x).square().sum(1)


def _two_outputs() -> Draft:
    net, x = nn.Linear(3, 4).double(), torch.randn(5, 2, 3, dtype=F64)
    return net, lambda: torch.stack([net(x[:, 0]).sin().sum(1), net(x[:, 1]).exp().sum(1)], dim=1)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.table(tokens)).tanh() @ self.table.weight.T


def _tied() -> Draft:
    net, tokens = _Tied().double(), torch.randint(7, (5, 3))
    return net, lambda: net(tokens).sin().sum((1, 2))


def _tables() -> Draft:
    net, first, second = nn.Embedding(9, 2).double(), *torch.randint(9, (2, 5, 3))
    return net, lambda: net(first).sin().sum((1, 2)) + net(second[:, 0]).exp().sum(1)


def _images() -> Draft:
    net = nn.Conv2d(2, 3, 3, padding=1).double()
    x, y = torch.randn(5, 2, 6, 6, dtype=F64), torch.randn(5, 2, 4, 4, dtype=F64)
    return net, lambda: sum(net(i).sin().sum((1, 2, 3)) for i in (x, y, -x))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


def _recurrent() -> Draft:
    net, x, y = (
        _Recurrent().double(),
        torch.randn(5, 6, 3, dtype=F64),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    return net, lambda: nn.functional.cross_entropy(net(x), y, reduction="none")


def _laplacian() -> Draft:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 2, dtype=F64)

    def residual() -> Tensor:
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(point).sum(), point, create_graph=True)
        bends = [
            torch.autograd.grad(slope[:, i].sum(), point, create_graph=True)[0][:, i]
            for i in range(2)
        ]
        return (sum(bends) - net(point).squeeze(1)).square()

    return net.double(), residual


def _users() -> Draft:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, user = torch.randn(23, 3, dtype=F64), torch.randint(6, (23,))
    y = torch.randint(2, (23,))
    total = torch.zeros(6, dtype=F64)
    return net, lambda: total.index_add(
        0, user, nn.functional.cross_entropy(net(x), y, reduction="none")
    )


DRAFTS = {
    "siamese": _siamese,
    "different numbers of positions": _lengths,
    "ragged and regular": _ragged,
    "a weight and its transpose": _autoencoder,
    "vectors": _two_outputs,
    "table and head": _tied,
    "tables": _tables,
    "images of two sizes": _images,
    "recurrent": _recurrent,
    "Laplacian": _laplacian,
    "users": _users,
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("seed", range(3))
def test_several_uses_are_exact(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, score = DRAFTS[name]()
    parameters, engine = reference.trainable(model), Engine(model)
    rows = reference.rows(score(), parameters)
    for _ in range(2):  # by a recipe, then by what is known of the structure
        J = engine.jacobian(score())
        weights = torch.randn(J.output_shape, dtype=F64)
        torch.testing.assert_close(J.norms().reshape(-1), rows.norm(dim=1))
        torch.testing.assert_close(J.combine(weights), reference.product(weights, rows, parameters))
        J = engine.jacobian(score())
        torch.testing.assert_close(J.gramian(), reference.gramian(rows, J.output_shape))
        torch.testing.assert_close(J.matrix(), rows)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
@pytest.mark.parametrize("width", [1, 3])
def test_chunks_are_exact(chunk_size: int, width: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).double()
    x = torch.randn(7, 3, dtype=F64)
    J = Engine(net, chunk_size=chunk_size).gather(x)
    rows = reference.rows(net(x), reference.trainable(net))
    torch.testing.assert_close(J.norms().reshape(-1), rows.norm(dim=1))
    torch.testing.assert_close(J.gramian(), reference.gramian(rows, J.output_shape))
    torch.testing.assert_close(J.matrix(), rows)


class _Words(nn.Module):
    """Bags of words, images, and a layer that short poses do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.table = nn.EmbeddingBag(9, 4), nn.Embedding(9, 4)
        self.kernel, self.long = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, words: Tensor) -> Tensor:
        found = self.kernel(self.table(words).mT)  # [4, T]
        found = self.long(found.mT).sin() if len(words) > 3 else found.mT
        return (found.sum(0) * self.bags(words.unsqueeze(0))[0]).sum()


def test_chunks_whose_poses_have_different_lengths_are_exact() -> None:
    torch.manual_seed(0)
    net, poses = _Words().double(), [torch.randint(9, (n,)) for n in (2, 5, 3, 3, 7)]
    J = Engine(net).gather(poses)
    rows = reference.rows(torch.stack([net(p) for p in poses]), reference.trainable(net))
    torch.testing.assert_close(J.norms(), rows.norm(dim=1))
    torch.testing.assert_close(J.gramian(), rows @ rows.mT)
    torch.testing.assert_close(J.matrix(), rows)


def _wide(width: int = 256) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def _pairs(net: nn.Module) -> Tensor:
    x, y = torch.randn(2, 16, 256)
    return (net(x) - net(y)).square().sum(1)


def _near_pairs(net: nn.Module) -> Tensor:
    x = torch.randn(16, 256)
    return (net(x) - net(x + 1e-3 * torch.randn(16, 256))).square().sum(1)


def _pooled(net: nn.Module) -> Tensor:
    owner = torch.cat([torch.arange(16), torch.randint(16, (30,))])
    return torch.zeros(16).index_add(0, owner, net(torch.randn(46, 256)).square().sum(1))


def _rolled(net: nn.Module) -> Tensor:
    h = torch.randn(16, 256)
    for _ in range(4):
        h = net(h)
    return h.square().sum(1)


MANY = {"pairs": _pairs, "near pairs": _near_pairs, "pooled": _pooled, "rolled out": _rolled}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("take", [PoseJacobian.norms, PoseJacobian.gramian])
def test_several_uses_need_no_rows(name: str, take: Callable[[PoseJacobian], Tensor]) -> None:
    net = _wide()
    engine = Engine(net, check="never")
    engine.jacobian(MANY[name](net))
    J = engine.jacobian(MANY[name](net))
    with peak_live_bytes() as peak:
        take(J)
        J.backward(torch.ones(16))
    assert peak.bytes < 16 * 256 * 256 * 4 / 2  # the rows of one weight take twice as much


@pytest.mark.parametrize("chunk_size", [4, 5])
def test_chunks_need_no_rows(chunk_size: int) -> None:
    net, x = _wide(), torch.randn(16, 256)
    J = Engine(net, chunk_size=chunk_size).gather(x, loss=lambda y, _: y.square().sum(1))
    with peak_live_bytes() as peak:
        J.backward(Clip(1.0))
    assert peak.bytes < 16 * 256 * 256 * 4 / 2


def test_uses_that_cancel_keep_their_digits() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(64, 64, bias=False), torch.randn(6, 64)
    for apart in (1e-1, 1e-2, 1e-3):
        y = x + apart * torch.randn(6, 64)
        J = Engine(net, check="never").jacobian((net(x) - net(y)).sum(1))
        exact = reference.rows(
            (net.double()(x.double()) - net(y.double())).sum(1), {"w": net.weight}
        )
        net.float()
        torch.testing.assert_close(J.norms().double(), exact.norm(dim=1), rtol=1e-5, atol=0)
        scale = torch.outer(exact.norm(dim=1), exact.norm(dim=1))
        found = J.gramian().double() / scale
        torch.testing.assert_close(found, exact @ exact.mT / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_norms_of_a_large_table_need_no_rows(kind: type[nn.Module]) -> None:
    table, tokens = kind(100_000, 4).to(DEVICE), torch.randint(100_000, (8, 5), device=DEVICE)

    def score() -> Tensor:
        return table(tokens).sin().flatten(1).sum(1)

    J = Engine(table, check="never").jacobian(score())
    with peak_live_bytes() as peak:
        norms = J.norms()
    assert peak.bytes < 100_000 * 4
    torch.testing.assert_close(norms, J.gramian().diagonal().sqrt())
    rows = reference.rows(score(), reference.trainable(table))
    torch.testing.assert_close(norms, rows.norm(dim=1))


class Reshaped(nn.Module):
    """A scale and a bias that enter in other shapes than they are held in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 1)
        self.scale, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(2, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh().mT * self.scale[:, None]  # [m, 8, T]
        scores: Tensor = self.last((hidden + self.bias.reshape(1, 8, 1)).sin().mT)
        return scores.sum((1, 2))


def test_a_parameter_in_another_shape_needs_no_backward_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, w = Reshaped(), torch.randn(64, dtype=F64)
    engine = Engine(model)
    for _ in range(3):
        output = model(torch.randn(64, 16, 3, dtype=F64))
        expected = reference.rows(output, reference.trainable(model))
        J = engine.jacobian(output)
    assert J.paths["bias"] == J.paths["scale"] == ("closed form (Elementwise)",)
    monkeypatch.delattr(torch.autograd, "grad")
    torch.testing.assert_close(J.norms(), expected.norm(dim=1))
    found = torch.cat([gradient.flatten() for gradient in J.combine(w).values()])
    torch.testing.assert_close(found, w @ expected)
