"""Laws of the closed forms, and of layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Engine, StaleFactorError
from posegrad.jacobian import NOBODY, Layout
from posegrad.jacobian._form import Side
from posegrad.jacobian._products import Products
from tests.device import DEVICE
from tests.drawing import double, times
from tests.jacobian.forms_table import CASES, SCALED, alive, owners


@pytest.mark.parametrize("name", CASES)
@times(0.4)
@given(owned=owners())
def test_rows_are_the_products_with_one_poses_cotangents(
    name: str, owned: tuple[int, Tensor]
) -> None:
    count, owner = owned
    case = CASES[name](len(owner))
    layout = Layout.along(count, case.dim, owner)
    cotangent = alive(case.cotangent, layout)
    assert case.form.accepts(cotangent.shape, layout)

    rows = case.form.rows(cotangent, layout)

    expected = torch.stack([case.form.vjp(layout.only(cotangent, i)) for i in range(count)])
    assert rows.shape == (count, *case.form.shape)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.sum(0), case.form.vjp(cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@times(0.4)
@given(owned=owners())
def test_what_else_a_form_offers_is_of_its_rows(name: str, owned: tuple[int, Tensor]) -> None:
    count, owner = owned
    case, size = CASES[name](len(owner)), len(owner)
    stated = Layout.along(count, case.dim, owner)
    one_each = Layout.regular(size, case.dim, size, 1, DEVICE)
    for layout in (stated, one_each):
        cotangent = alive(case.cotangent, layout)
        rows = case.form.rows(cotangent, layout)
        flat, into = rows.reshape(len(rows), -1), torch.full_like(rows, torch.nan)
        case.form.write_rows(cotangent, layout, into)
        torch.testing.assert_close(into, rows, rtol=1e-12, atol=1e-12)
        weights = torch.linspace(-1, 2, layout.count, dtype=cotangent.dtype)
        combined = case.form.combine(cotangent, layout, weights)
        if combined is not None:  # else there is no shorter way
            expected = torch.einsum("m...,m->...", rows, weights)
            torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-9)
        squares = case.form.squares(cotangent, layout, Products())
        if squares is not None:  # else rows are cheaper, or cancel
            torch.testing.assert_close(squares, flat.square().sum(1), rtol=1e-9, atol=1e-9)
        if case.form.prefers_pairs(cotangent.shape, layout, 1):
            gram = case.form.inner(cotangent, cotangent, layout, Products())
            if gram is not None:
                torch.testing.assert_close(gram, flat @ flat.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_change_of_the_output_is_the_adjoint(name: str) -> None:
    case = CASES[name](6)
    direction = double(*case.form.shape)
    change = case.form.jvp(direction, case.cotangent.shape)
    found = (change * case.cotangent).sum()
    torch.testing.assert_close(found, (case.form.vjp(case.cotangent) * direction).sum())


@pytest.mark.parametrize("name", CASES)
@times(0.4)
@given(owned=owners(), other=owners())
def test_what_forms_make_of_two_uses_and_of_projections(
    name: str, owned: tuple[int, Tensor], other: tuple[int, Tensor]
) -> None:
    sides, rows = [], []
    for count, owner in (owned, other):
        case = CASES[name](len(owner))
        layout = Layout.along(count, case.dim, owner)
        sides.append((case.form, Side(alive(case.cotangent, layout), layout)))
        rows.append(case.form.rows(*sides[-1][1]).reshape(count, -1))
    (form, own), (its_form, its) = sides
    met = form.across(own, its_form, its, Products())
    if met is not None:  # else rows are cheaper, or cancel
        torch.testing.assert_close(met, rows[0] @ rows[1].mT, rtol=1e-9, atol=1e-9)
    if len(form.shape) < 2:
        return
    left = double(2, form.shape[0])
    right = double(3, form.shape[1:].numel())
    found = form.projected((own.cotangent,), left, right)
    if found is not None:  # else rows have to be
        projected = found[0].rows(found[1][0], own.layout)
        grid = rows[0].reshape(-1, form.shape[0], right.shape[1])
        torch.testing.assert_close(projected, left @ grid @ right.mT, rtol=1e-9, atol=1e-9)


MET = [
    "linear, wide",
    "linear, wide, flipped",
    "linear, on the left",
    "bias",
    "embedding",
    "bilinear",
]


@pytest.mark.parametrize("name", MET)
def test_uses_meet_without_rows(name: str) -> None:
    case, layout = CASES[name](2), Layout.regular(2, int("left" in name), 2, 1, DEVICE)
    own = Side(case.cotangent, layout)
    assert case.form.across(own, case.form, own, Products()) is not None


@pytest.mark.parametrize("name", ["linear", "linear, flipped", "embedding", "convolution"])
def test_factors_are_projected_not_rows(name: str) -> None:
    case = CASES[name](4)
    left, right = torch.ones(1, case.form.shape[0]), torch.ones(1, case.form.shape[1:].numel())
    assert case.form.projected((case.cotangent,), left.double(), right.double()) is not None


@pytest.mark.parametrize("name", ["linear, wide", "linear, wide, flipped", "bias"])
def test_the_short_way_to_a_weighted_sum_is_taken(name: str) -> None:
    case = CASES[name](4)
    layout, weights = Layout.regular(4, 0, 4, 1, DEVICE), torch.ones(4).double()
    assert case.form.combine(case.cotangent, layout, weights) is not None


@pytest.mark.parametrize("name", CASES)
def test_a_form_moves_with_its_factors(name: str) -> None:
    case = CASES[name](6)
    moved = case.form.to(DEVICE)
    assert torch.equal(moved.vjp(case.cotangent), case.form.vjp(case.cotangent))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case(6).form.factors()])
def test_a_factor_changed_in_place_is_refused(name: str) -> None:
    case = CASES[name](6)
    case.form.factors()[0].tensor.add_(1)
    layout = Layout.along(3, case.dim, torch.arange(6) // 2)
    with pytest.raises(StaleFactorError, match=r"The input, of shape .* changed in place"):
        case.form.vjp(case.cotangent)
    with pytest.raises(StaleFactorError, match="expected 0"):
        case.form.rows(case.cotangent, layout)
    with pytest.raises(StaleFactorError, match="change a clone"):
        case.form.to(DEVICE)


def test_inner_products_of_a_bilinear_form() -> None:
    case, layout = CASES["bilinear"](5), Layout.regular(5, 0, 5, 1, None)
    assert case.form.prefers_pairs(case.cotangent.shape, layout, 1)
    rows = case.form.rows(case.cotangent, layout).flatten(1)
    found = case.form.inner(case.cotangent, case.cotangent, layout, Products())
    torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-12, atol=1e-12)


PAIRED = SCALED | {n: CASES[n] for n in CASES if n.startswith(("embedding", "batched"))}


@pytest.mark.parametrize("name", PAIRED)
@given(owned=owners())
def test_inner_products_are_those_of_the_rows(name: str, owned: tuple[int, Tensor]) -> None:
    count, owner = owned
    case = PAIRED[name](len(owner))
    form, layout = case.form, Layout.along(count, case.dim, owner)
    first, second = (alive(factor * case.cotangent, layout) for factor in (1, -3))
    rows = [
        torch.stack([form.vjp(layout.only(b, i)) for i in range(count)]).flatten(1)
        for b in (first, second)
    ]

    found = form.inner(first, second, layout, Products())
    assert found is not None
    torch.testing.assert_close(found, rows[0] @ rows[1].mT, rtol=1e-12, atol=1e-12)
    itself = form.inner(first, first, layout, Products())
    if itself is not None:  # else the rows of a pose cancel
        torch.testing.assert_close(itself, rows[0] @ rows[0].mT, rtol=1e-9, atol=1e-9)


@given(owned=owners(), dim=st.integers(0, 2))
def test_layouts_are_plain_loops(owned: tuple[int, Tensor], dim: int) -> None:
    count, owner = owned
    tensor = double(len(owner), 2, 3).movedim(0, dim)
    layout = Layout.along(count, dim, owner)
    cotangent = alive(tensor, layout)
    rows, weights = layout.front(cotangent), double(count)
    owned = [[r for r, j in enumerate(owner.tolist()) if j == i] for i in range(count)]

    sums = torch.stack([rows[own].sum(0) for own in owned])
    torch.testing.assert_close(layout.sum(rows), sums)
    weighted = sum(weights[i] * layout.only(cotangent, i) for i in range(count))
    torch.testing.assert_close(layout.weigh(cotangent, weights), weighted)
    for i, segment in enumerate(layout.segments(cotangent)):
        torch.testing.assert_close(segment.sum(0), sums[i])
        assert len(segment) == len(owned[i]) or layout.is_regular()
        only = layout.front(layout.only(tensor, i))
        assert only.flatten(1).any(1).nonzero().flatten().tolist() == owned[i]


@given(
    count=st.integers(1, 6),
    stride=st.integers(1, 4),
    outer=st.integers(1, 3),
    dead=st.lists(st.integers(0, 71), max_size=4),
)
def test_regular_layouts_are_detected(count: int, stride: int, outer: int, dead: list[int]) -> None:
    owner = (torch.arange(outer * count * stride) // stride) % count
    owner[[row % len(owner) for row in dead]] = NOBODY
    layout = Layout.along(count, 0, owner)
    rows = torch.arange(1.0, len(owner) + 1)
    grid = layout.by_pose(rows)  # [m, R / m]

    assert layout.is_regular()
    assert grid.shape == (count, outer * stride)
    for i in range(count):
        assert {*rows[owner == i].tolist()} <= {*grid[i].tolist()}


def test_rows_along_several_dimensions() -> None:
    owner = torch.randint(3, (8,))
    layout, tensor = Layout(3, (0, 2), owner), torch.randn(2, 5, 4)
    kept = layout.only(tensor, 1)
    expected = torch.where((owner == 1).reshape(2, 1, 4), tensor, 0)
    assert torch.equal(kept, expected)
    assert torch.equal(layout.weigh(tensor, torch.eye(3)[1]), expected)
    assert torch.equal(layout.front(tensor), tensor.transpose(1, 2).reshape(8, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_gramian(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 1)).to(dtype)
    J = Engine(model).jacobian(model(torch.randn(5, 8, dtype=dtype)).squeeze(1))
    rows = J.matrix().float()
    assert J.gramian().dtype == torch.float32
    torch.testing.assert_close(J.gramian(), rows @ rows.mT, rtol=3e-2, atol=3e-2)
    assert all(g.dtype == dtype for g in J.combine(torch.ones(5, dtype=dtype)).values())


def test_norms_of_rows_that_cancel_are_numbers() -> None:
    layer, x = nn.Linear(64, 64, bias=False), torch.randn(4, 64)
    J = Engine(layer, check="never").jacobian((layer(x) - layer(x * (1 + 1e-7))).sum(1))
    assert bool(J.norms().isfinite().all())
