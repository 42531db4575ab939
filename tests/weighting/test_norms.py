"""Norms of rows without the rows: every closed form, every layout, and rows that cancel."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Engine, PoseJacobian
from posegrad.jacobian import Arrangement, Block, Factors, Layout
from posegrad.testing import peak_live_bytes
from tests import reference
from tests.jacobian.forms_table import CASES, Case, owners

F64 = torch.float64


def _scaled(rows: int) -> Case:
    case = CASES["linear"](rows)
    return replace(case, form=replace(case.form, scale=-0.5))


FORMS = {**CASES, "linear, scaled": _scaled}


def _jacobian(case: Case, layout: Layout) -> PoseJacobian:
    """The Jacobian of one parameter that enters by one form."""
    parameter = nn.Parameter(torch.zeros(case.form.shape, dtype=F64))
    cotangent = case.cotangent - layout.only(case.cotangent, -1)  # rows of nobody are zero
    shape = Arrangement(torch.Size([layout.count]), None)
    part = Factors.direct(case.form, layout, shape, (cotangent,))
    block = Block.of(parameter, layout.count, [part])
    return PoseJacobian(torch.zeros(layout.count, dtype=F64), {"p": parameter}, {"p": block})


@pytest.mark.parametrize("name", FORMS)
@given(owned=owners())
def test_norms_are_those_of_the_rows(name: str, owned: tuple[int, Tensor]) -> None:
    count, owner = owned
    case = FORMS[name](len(owner))
    layout = Layout.along(count, case.dim, owner)
    expected = _jacobian(case, layout).matrix().norm(dim=1)
    found = _jacobian(case, layout).norms()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("each", [1, 3])
def test_norms_where_the_pattern_is_known(name: str, each: int) -> None:
    case = FORMS[name](4 * each)
    for stride in {1, each}:
        layout = Layout.regular(4, case.dim, 4 * each, stride, None)
        expected = _jacobian(case, layout).matrix().norm(dim=1)
        torch.testing.assert_close(_jacobian(case, layout).norms(), expected)


# name: from a layer's outputs of T tokens of m poses, in some layout, to [m]
LAYOUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "[m, T, d]": lambda layer, x: layer(x).sin().sum((1, 2)),
    "[T, m, d]": lambda layer, x: layer(x.transpose(0, 1)).sin().sum((0, 2)),
    "[m T, d]": lambda layer, x: layer(x.flatten(0, 1)).sin().unflatten(0, x.shape[:2]).sum((1, 2)),
    "ragged": lambda layer, x: _ragged(layer, x),
    "[m, T, d], [m, 2] out": lambda layer, x: torch.stack(
        [layer(x).sin().sum((1, 2)), layer(x).square().sum((1, 2))], dim=1
    ),
}


def _ragged(layer: nn.Module, x: Tensor) -> Tensor:
    """Pose i has one token more than pose i - 1, up to all of them."""
    m, length, _ = x.shape
    owner = torch.arange(m).repeat_interleave((torch.arange(m) % length) + 1)
    tokens = x.flatten(0, 1)[: len(owner)]
    return x.new_zeros(m).index_add(0, owner, layer(tokens).sin().sum(1))


@pytest.mark.parametrize("name", LAYOUTS)
@given(
    m=st.integers(2, 5),
    length=st.integers(1, 7),
    d=st.sampled_from([1, 2, 3, 16]),
    p=st.sampled_from([1, 2, 5, 16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_norms_of_a_linear_layer_in_every_layout(
    name: str, m: int, length: int, d: int, p: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(d, p, bias=bias).double(), torch.randn(m, length, d, dtype=F64)
    output = LAYOUTS[name](layer, x)
    rows = reference.rows(output, reference.trainable(layer))
    J = Engine(layer, check="never").jacobian(output)
    expected = rows.norm(dim=1).reshape(output.shape)
    torch.testing.assert_close(J.norms(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(J.norms(), expected, rtol=1e-10, atol=1e-12)  # held otherwise now


@given(
    length=st.integers(1, 3),
    apart=st.sampled_from([1.0, 0.1, 1e-2, 1e-3]),
    some=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rows_that_cancel_keep_three_digits(
    length: int, apart: float, some: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(24, 24, bias=False), torch.randn(4, length, 24)
    other = x + apart * torch.randn_like(x)
    if some:
        other[1:] = torch.randn_like(other[1:])  # only the first pose cancels

    def score(layer: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        return layer(torch.cat([x, other], 1)).sum(2) @ torch.ones(2 * length).to(x).where(
            torch.arange(2 * length) < length, -1.0
        )

    norms = Engine(layer, check="never").jacobian(score(layer, x, other)).norms()

    layer = layer.double()
    exact = reference.rows(score(layer, x.double(), other.double()), reference.trainable(layer))
    torch.testing.assert_close(norms.double(), exact.norm(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("apart", [1e-4, 1e-6, 0.0])
def test_norms_of_rows_that_cancel_further_are_those_of_the_rows(apart: float) -> None:
    layer, x = nn.Linear(24, 24, bias=False), torch.randn(4, 24)
    engine = Engine(layer, check="never")
    output = layer(torch.stack([x, (1 + apart) * x], 1)) @ torch.ones(24) @ torch.tensor([1.0, -1])
    J = engine.jacobian(output)
    torch.testing.assert_close(J.norms(), J.matrix().norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_are_taken_in_float32(dtype: torch.dtype) -> None:
    model, x = nn.Linear(512, 1).to(dtype), 40 * torch.randn(5, 512, dtype=dtype)
    J = Engine(model).jacobian(model(x).squeeze(1))
    assert J.norms().dtype == torch.float32
    assert bool((J.norms().square() > torch.finfo(torch.float16).max).all())
    expected = (x.double().square().sum(1) + 1).sqrt()
    torch.testing.assert_close(J.norms().double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_poses_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(512, 512, bias=False).to(dtype), torch.randn(8, 64, 512, dtype=dtype)
    factors = torch.randn(8, 64, 512, dtype=dtype)  # and cotangents
    J = Engine(layer, check="never").jacobian((layer(x) * factors).flatten(1).sum(1))
    rows = factors.double().mT @ x.double()  # [m, p, d]
    exact = rows.flatten(1) @ rows.flatten(1).mT
    assert J.norms().dtype == J.gramian().dtype == torch.float32
    torch.testing.assert_close(J.norms().double(), exact.diagonal().sqrt(), rtol=1e-5, atol=0)
    size = float(exact.diagonal().max())
    torch.testing.assert_close(J.gramian().double(), exact, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("length", [1, 2])
def test_norms_of_wide_layers_need_no_rows(length: int) -> None:
    layer, x = nn.Linear(128, 128, bias=False), torch.randn(16, length, 128)
    J = Engine(layer, check="never").jacobian(layer(x).sin().sum((1, 2)))
    with peak_live_bytes() as peak:
        J.norms()
    assert peak.bytes < 16 * 128 * 128 * 4 / 8
