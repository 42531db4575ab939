"""J is a linear operator: products, adjoints, slices and pairs of it, for every architecture."""

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import (
    Engine,
    IllConditionedError,
    Jacobian,
    NonFiniteGradientError,
    PoseJacobian,
    ShapeMismatchError,
)
from posegrad.testing import peak_live_bytes
from tests import reference
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.row import draw
from tests.drawing import double, times

F64 = torch.float64
EXACT = [name for name, row in ARCHITECTURES.items() if row.exact]


def _read(
    row: Architecture, model: nn.Module, engine: Engine, seed: int
) -> tuple[Jacobian, Tensor]:
    """A Jacobian, and its rows by plain autograd, in float64."""
    output = row.output(model, seed)
    matrix = reference.rows(output, reference.trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are slow, and say so
        return engine.jacobian(output), matrix.double()


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.double().reshape(-1) for g in gradients.values()])


def _close(found: Tensor, expected: Tensor, row: Architecture, scale: float) -> None:
    torch.testing.assert_close(
        found.double(), expected.reshape(found.shape), rtol=0, atol=row.tolerance * max(scale, 1e-9)
    )


@pytest.mark.parametrize("name", EXACT)
def test_products_are_those_of_the_matrix(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model)
    J, matrix = _read(row, model, engine, 0)
    v = draw(3, matrix.shape[1], 2)
    size = float(matrix.abs().max()) * matrix.shape[1] ** 0.5
    assert J.shape == matrix.shape
    assert J.T.shape == matrix.shape[::-1]
    assert J.output_shape == J.output.shape

    for _ in range(2):  # from factors, then with what products have kept
        _close(J @ v[:, 0], matrix @ v[:, 0], row, size)
        _close(J @ v, matrix @ v, row, size)
        w = draw(4, *J.output_shape)
        by_name = dict(zip(J.shapes, _pieces(J, v[:, 0]), strict=True))
        _close(J @ by_name, matrix @ v[:, 0], row, size)
        back = _flat(w @ J)
        _close(back, w.reshape(-1).double() @ matrix, row, size * len(matrix))
        assert (J.T @ w).keys() == (w @ J).keys()
        left = (w.double() * (J @ v[:, 0]).double()).sum()
        _close(left, back @ v[:, 0], row, size * len(matrix) * float(v.abs().max()))
        J.gramian(), J.norms(), J.matrix()


def _pieces(J: Jacobian, flat: Tensor) -> list[Tensor]:
    pieces = flat.split([shape.numel() for shape in J.shapes.values()])
    return [piece.reshape(shape) for piece, shape in zip(pieces, J.shapes.values(), strict=True)]


@pytest.mark.parametrize("name", EXACT)
def test_two_jacobians_meet_as_their_matrices(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    engine = Engine(model)
    seeds = (0, 2) if name == "Frozen, then unfrozen" else (0, 1)
    (J, first), (K, second) = (_read(row, model, engine, seed) for seed in seeds)
    products = first @ second.T
    size = float(first.norm(dim=1).max() * second.norm(dim=1).max())

    met = J @ K.T

    count = K.output_shape.numel()
    order = torch.arange(count).reshape(tuple(reversed(K.output_shape)))
    order = order.permute(tuple(reversed(range(order.ndim))))  # K's own order, from reversed
    assert met.shape == (*J.output_shape, *reversed(K.output_shape))
    flat = met.reshape(len(first), -1)[:, order.reshape(-1)]
    _close(flat, products, row, size)
    again = (K @ J.T).permute(tuple(reversed(range(met.ndim))))
    _close(again, met.double(), row, size)
    expected = reference.gramian(first, J.output_shape)
    _close(J @ J.T, expected, row, size)
    each = J.gramian(per_parameter=True)
    total = sum(gram.double() for gram in each.values())
    _close(torch.as_tensor(total), expected, row, size)
    norms = torch.stack([n.double() for n in J.norms(per_parameter=True).values()]).norm(dim=0)
    _close(norms, first.norm(dim=1), row, float(first.norm(dim=1).max()))


@pytest.mark.parametrize("name", EXACT)
def test_slices_are_jacobians(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    J, matrix = _read(row, model, Engine(model), 0)
    if not J.output_shape:
        with pytest.raises(IndexError, match="its gradient is J"):
            J[:]
        return
    m, size = len(J), float(matrix.abs().max())
    grid = matrix.reshape(m, -1, matrix.shape[1])
    mask = torch.arange(m) % 2 == 0
    for index in (slice(1, 4), slice(None, None, -2), mask, [m - 1, 0, 0], torch.tensor([-1])):
        at = torch.tensor(_numbers(index, m), dtype=torch.long)
        expected = grid[at].flatten(0, 1)
        part = J[index]
        assert isinstance(part, PoseJacobian)
        torch.testing.assert_close(part.output, J.output[at])
        _close(part.matrix(), expected, row, size)
        _close(part.norms(), expected.norm(dim=1), row, size * matrix.shape[1] ** 0.5)
        gram = reference.gramian(expected, part.output_shape)
        _close(part.gramian(), gram, row, size**2 * matrix.shape[1])
        w = draw(5, *part.output_shape)
        back = _flat(w @ part)
        _close(back, w.reshape(-1).double() @ expected, row, size * len(expected))
    whole = Jacobian.cat([J[:2], J[2:]])
    _close(whole.matrix(), matrix, row, size)
    _close(whole.norms(), matrix.norm(dim=1), row, size * matrix.shape[1] ** 0.5)
    for i, found in enumerate(J):
        flat = torch.cat([g.double().flatten(len(J.output_shape) - 1) for g in found.values()], -1)
        _close(flat, grid[i], row, size)
        _close(J[i][next(iter(found))], next(iter(found.values())).double(), row, size)
    assert len(J[:0]) == 0
    assert J[:0].gramian().numel() == 0


def _numbers(index: object, count: int) -> list[int]:
    if isinstance(index, slice):
        return list(range(count))[index]
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.nonzero().flatten().tolist()
    assert isinstance(index, list | Tensor)
    return [int(i) % count for i in index]


@pytest.mark.parametrize("name", EXACT)
def test_projections_are_the_same_from_factors_and_from_rows(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    J, matrix = _read(row, model, Engine(model), 0)
    assert isinstance(J, PoseJacobian)
    size = float(matrix.norm(dim=1).max())
    projected = J.project(12, seed=1)
    assert projected.shape == (*J.output_shape, 12)
    _close(J.in_form("dense").project(12, seed=1), projected.double(), row, 10 * size)
    assert not torch.equal(J.project(12, seed=2), projected) or not bool(matrix.any())
    if J.output_shape:
        _close(J[1:3].project(12, seed=1), projected[1:3].double(), row, 10 * size)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)
    ),
}


def _gathered(name: str, m: int, seed: int, **options: object) -> tuple[nn.Module, Jacobian]:
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    return model, Engine(model, **options).gather(double(m, 5))


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 999), m=st.integers(1, 6), data=st.data())
def test_an_index_picks_rows_of_chunks(name: str, seed: int, m: int, data: st.DataObject) -> None:
    _, J = _gathered(name, m, seed, chunk_size=data.draw(st.integers(1, 3)))
    index = data.draw(st.lists(st.integers(-m, m - 1), max_size=7))
    part = J[torch.tensor(index, dtype=torch.long)]
    torch.testing.assert_close(part.matrix(), J.matrix()[index])
    torch.testing.assert_close(part.gramian(), J.gramian()[index][:, index])
    torch.testing.assert_close(J @ part.T, J.gramian()[:, index])


@pytest.mark.parametrize("name", MODELS)
def test_a_direction_is_a_finite_step(name: str) -> None:
    model, _ = _gathered(name, 4, 0)
    torch.manual_seed(0)
    X = double(4, 5)
    J = Engine(model).jacobian(model(X).squeeze(1))
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def moved(h: float) -> Tensor:
        state = {n: p + h * direction[n] for n, p in model.named_parameters()}
        return torch.func.functional_call(model, state, (X,)).squeeze(1)

    torch.testing.assert_close(J @ direction, (moved(1e-6) - moved(-1e-6)) / 2e-6)


@pytest.mark.parametrize("name", ["MLP", "Conv2d", "TransformerEncoder"])
def test_products_leave_the_operator_as_it_is(name: str) -> None:
    row = ARCHITECTURES[name]
    model = row.build()
    J, _ = _read(row, model, Engine(model), 0)
    report, first = J.report(), J.matrix()
    J.gramian(), J.norms(), J.block(next(iter(J.shapes))), J.project(4), J[1:]
    J @ draw(0, J.shape[1], 3)
    assert J.report() == report
    torch.testing.assert_close(J.matrix(), first, rtol=1e-12, atol=1e-12)


def test_a_direction_costs_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    J = Engine(model, check="never").jacobian(model(torch.randn(64, 256)).squeeze(1))
    v = torch.randn(J.shape[1])
    J @ v
    with peak_live_bytes() as peak:
        J @ v
    assert peak.bytes < 4 * 256**2 * 4  # far below 64 gradients of the weight


def test_gradients_that_cancel_meet_without_loss() -> None:
    torch.manual_seed(0)
    x, factors = 100 + torch.randn(2, 8, 64, 128), torch.randn(2, 8, 64, 128)
    factors -= factors.mean(2, keepdim=True)
    layer = nn.Linear(128, 128, bias=False)
    J, K = (
        Engine(layer, check="never").jacobian((layer(a) * f).sum((1, 2)))
        for a, f in zip(x, factors, strict=True)
    )
    first, second = (f.double().mT @ a.double() for a, f in zip(x, factors, strict=True))
    first, second = first.flatten(1), second.flatten(1)
    lengths = torch.outer(first.norm(dim=1), second.norm(dim=1))
    found = (J @ K.T).double() / lengths
    torch.testing.assert_close(found, first @ second.mT / lengths, rtol=0, atol=1e-4)


@times(0.25)
@given(seed=st.integers(0, 99), k=st.sampled_from([4, 6, 16]))
def test_projected_inner_products_are_unbiased_within_the_bound(seed: int, k: int) -> None:
    _, J = _gathered("images", 3, seed)
    G = J.gramian()
    draws = 200
    found = torch.stack(
        [p @ p.mT for p in (J.project(k, seed=1000 * seed + s) for s in range(draws))]
    )
    k1, k2 = {4: (2, 2), 6: (2, 3), 16: (4, 4)}[k]
    lengths = torch.outer(J.norms(), J.norms())
    deviation = lengths * (2 / k1 + 2 / k2 + 4 / k) ** 0.5
    assert bool(((found.mean(0) - G).abs() < 5 * deviation / draws**0.5).all())
    assert bool(((found - G).square().mean(0).sqrt() < 1.5 * deviation).all())


def test_signs_are_alike_on_every_machine() -> None:
    """The rows are the six unit matrices, so their projections are all there is of it."""
    model, number = nn.Linear(3, 2, bias=False), torch.arange(6)
    outputs = model(torch.eye(3)[number % 3])[number, number // 3]
    found = Engine(model).jacobian(outputs).project(4, seed=7)
    signs = ["-++-", "+--+", "+--+", "-+-+", "+-+-", "+-+-"]
    expected = torch.tensor([[0.5 if sign == "+" else -0.5 for sign in row] for row in signs])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", MODELS)
def test_a_solution_is_that_of_the_dense_system(name: str, dtype: torch.dtype) -> None:
    model, _ = _gathered(name, 5, 0)
    model.to(dtype)
    X, r = torch.randn(5, 5, dtype=dtype), torch.randn(5, dtype=dtype)
    J = Engine(model).jacobian(model(X).squeeze(1))
    rows = J.matrix().double()
    w = J.solve(r, damping=0.1)
    assert w.dtype == dtype
    system = rows @ rows.mT + 0.1 * torch.eye(5, dtype=F64)
    torch.testing.assert_close(
        w.double(), torch.linalg.solve(system, r.double()), rtol=1e-4, atol=1e-6
    )

    J.backward(w)
    step = _flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    normal = rows.mT @ rows + 0.1 * torch.eye(J.shape[1], dtype=F64)
    expected = torch.linalg.solve(normal, rows.mT @ r.double())
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-5)


def test_a_gramian_that_float32_cannot_hold_is_solved_in_double() -> None:
    """Two rows that differ in their sixth digit: their Gramian, in float32, is singular."""
    layer = nn.Linear(2, 1, bias=False)
    J = Engine(layer).jacobian(layer(torch.tensor([[1.0, 0.0], [1.0, 1e-4]])).squeeze(1))
    w = J.solve(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(w, torch.tensor([-1e8, 1e8]), rtol=1e-3, atol=0)


def test_rows_that_depend_on_each_other_need_damping() -> None:
    layer = nn.Linear(2, 1)
    J = Engine(layer).jacobian(layer(torch.ones(3, 2)).squeeze(1))
    with pytest.raises(IllConditionedError, match="no definite solution: its eigenvalues go from"):
        J.solve(torch.ones(3))
    torch.testing.assert_close(J.solve(torch.ones(3), damping=1.0), torch.full((3,), 0.1))
    for damping in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="a finite number from 0 on"):
            J.solve(torch.ones(3), damping=damping)
    with pytest.raises(ShapeMismatchError, match="one weight for each"):
        J.solve(torch.ones(2))
    J = Engine(layer).jacobian(layer(torch.full((3, 2), torch.inf)).squeeze(1))
    with pytest.raises(NonFiniteGradientError, match="not finite"):
        J.solve(torch.ones(3), damping=1.0)


REFUSED: dict[type[Exception], dict[str, Callable[[Jacobian], object]]] = {
    ShapeMismatchError: {
        r"J has 50 columns: v must be \[50\]": lambda J: J @ torch.ones(3, dtype=F64),
        r"0.bias \[3\] for \[7\]": lambda J: J @ {"0.bias": torch.ones(3)},
        "one weight for each": lambda J: torch.ones(3) @ J,
        "The other Jacobian is by other parameters": lambda J: J @ _gathered("images", 2, 0)[1].T,
        "Jacobian 1 is by other parameters": lambda J: Jacobian.cat(
            [J, _gathered("images", 2, 0)[1]]
        ),
        "the parameters of another model": lambda J: Jacobian.cat([J, _gathered("MLP", 2, 0)[1]]),
    },
    KeyError: {"v names 'bias'": lambda J: J @ {"bias": torch.ones(7)}},
    TypeError: {
        "v holds for 0.bias a float.\nPass tensors": lambda J: J @ {"0.bias": 3.0},  # type: ignore[dict-item]
        "complex64, but J is real": lambda J: J @ torch.ones(50, dtype=torch.complex64),
        "but v is a list": lambda J: J @ [1.0],  # type: ignore[operator]
    },
    IndexError: {
        r"asked for \[4\]": lambda J: J[[0, 4]],
        r"is indexed by \[3\], torch.bool": lambda J: J[torch.ones(3, dtype=torch.bool)],
        r"is indexed by \[2\], torch.float32": lambda J: J[torch.ones(2)],
        "out of range": lambda J: J[4],
    },
    ValueError: {
        "k is 0": lambda J: J.project(0),
        "no Jacobians to put together": lambda J: Jacobian.cat([]),
    },
}


@pytest.mark.parametrize(
    ("error", "match"), [(error, match) for error, rows in REFUSED.items() for match in rows]
)
def test_what_does_not_fit_is_refused(error: type[Exception], match: str) -> None:
    _, J = _gathered("MLP", 4, 0)
    with pytest.raises(error, match=match):
        REFUSED[error][match](J)


def test_an_entry_of_several_numbers_that_is_not_there_is_refused() -> None:
    model = nn.Linear(3, 2)
    J = Engine(model).jacobian(model(torch.randn(4, 3)))
    torch.testing.assert_close(J[-1]["weight"], J.block("weight")[3])
    for index in (4, -5, torch.tensor(7)):
        with pytest.raises(IndexError, match="has 4 entries along dimension 0"):
            J[index]


def test_the_nan_of_another_entry_does_not_reach_a_row() -> None:
    for shape in ((), (2,)):
        model = nn.Linear(2, 2) if shape else nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
        x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 4.0]])
        J = Engine(model, check="never").jacobian(model(x))
        for i in (0, 2):
            assert all(rows.isfinite().all() for rows in J[i].values())
        for i, rows in enumerate(J):
            for name, own in rows.items():
                torch.testing.assert_close(own, J.block(name)[i], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_numbers_of_any_kind_pick_entries(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 1)
    J = Engine(model).jacobian(model(torch.randn(200, 2)).squeeze(1))
    index = torch.tensor([0, 3], dtype=dtype)
    for picked in (J[index], J[index.numpy()], J[[0, 3]]):
        torch.testing.assert_close(picked.matrix(), J.matrix()[[0, 3]])
    mask = torch.arange(200) % 7 == 0
    torch.testing.assert_close(J[mask.numpy()].matrix(), J.matrix()[mask])


def test_whole_numbers_have_a_solution_that_is_not_cut() -> None:
    model = nn.Linear(2, 1)
    J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
    w = J.solve(torch.tensor([3, 0]), damping=1.0)
    torch.testing.assert_close(w, J.solve(torch.tensor([3.0, 0.0]), damping=1.0))


def test_the_coarsest_dtype_tells_what_is_rounding() -> None:
    torch.manual_seed(0)
    narrow, wide = nn.Linear(3, 8, bias=False), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    x = torch.randn(1, 3)
    alike = torch.cat([x, x * torch.tensor([1 + 1.2e-7, 1, 1])])
    model = nn.ModuleList([narrow])
    model.register_parameter("wide", wide)
    J = Engine(model).jacobian(narrow(alike).sum(1).double() + wide)
    with pytest.raises(IllConditionedError, match="rounding errors"):
        J.solve(torch.tensor([1.0, 0.0]))


# Factors of one row: their own size, and that of their cotangents.
SIZES = [(1e-23, 1e15), (1e-25, 1e25), (1e-21, 1e18), (1e-18, 1e17), (1e25, 1e-25), (1e21, 1e-19)]


def _sized(model: nn.Module, count: int, small: float, large: float) -> Jacobian:
    x, c = torch.randn(2, count, 4)
    return Engine(model).jacobian((model(x * small) * (c * large)).sum(1))


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_a_gramian_whose_factors_leave_float32_is_that_of_the_rows(
    small: float, large: float
) -> None:
    torch.manual_seed(0)
    J = _sized(nn.Linear(4, 4, bias=False), 3, small, large)
    rows = J.matrix().double()
    expected = rows @ rows.mT
    torch.testing.assert_close(J.gramian().double(), expected, rtol=1e-5, atol=0)
    (alone,) = J.gramian(per_parameter=True).values()
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(J.norms().double(), rows.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_products_whose_factors_leave_float32_are_those_of_the_rows(
    small: float, large: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    J, K = (_sized(model, count, small, large) for count in (3, 5))
    first, second = J.matrix().double(), K.matrix().double()
    lengths = torch.outer(first.norm(dim=1), second.norm(dim=1))
    J, K = Jacobian.cat([J]), Jacobian.cat([K])  # nothing is formed yet
    found = (J @ K.T).double() / lengths
    torch.testing.assert_close(found, first @ second.mT / lengths, rtol=0, atol=1e-5)


def test_rows_of_zeros_and_of_nan_meet_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    x, c = torch.randn(2, 3, 4)
    x[0], c[1] = 0, torch.nan
    J = Engine(model, check="never").jacobian((model(x) * c).sum(1))
    K = _sized(model, 5, 1.0, 1.0)
    rows = J.matrix().double() @ K.matrix().double().mT
    torch.testing.assert_close((J @ K.T).double(), rows, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_columns_of_a_copy_are_met_by_name() -> None:
    """As of a network at two steps of its training."""
    (first, J), (second, K) = (_gathered("MLP", 4, seed) for seed in (0, 1))
    assert not torch.equal(first[0].weight, second[0].weight)
    torch.testing.assert_close(J @ K.T, J.matrix() @ K.matrix().mT)


@pytest.mark.parametrize("name", MODELS)
def test_no_directions_move_nothing(name: str) -> None:
    _, J = _gathered(name, 4, 0)
    found = J @ torch.ones(J.shape[1], 0, dtype=F64)
    assert found.shape == (4, 0)
    assert found.dtype == F64


@pytest.mark.parametrize("v", [torch.zeros(0), torch.zeros(0, 2), torch.zeros(0, 0), {}])
def test_no_parameters_move_in_any_direction(v: Tensor | dict[str, Tensor]) -> None:
    J = _gathered(next(iter(MODELS)), 4, 0)[1].of([])
    found = J @ v
    assert found.shape == (4, *(v.shape[1:] if isinstance(v, Tensor) else ()))
    assert not found.any()
