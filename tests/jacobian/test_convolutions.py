"""Kernels: every way to their rows, norms and Gramians, for kernels of any kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from posegrad import Engine
from posegrad.jacobian import NOBODY, Factor, Layout
from posegrad.jacobian._products import Products
from posegrad.jacobian.layers import Convolution
from posegrad.jacobian.layers._image_products import Images, Way
from posegrad.testing import peak_live_bytes

F64 = torch.float64


@dataclass
class Case:
    """A convolution of images `[N, C, ...]`, and two cotangents."""

    images: Tensor
    kernel: Tensor
    options: tuple[object, ...]
    output: Tensor

    @property
    def form(self) -> Convolution:
        return Convolution(self.kernel.shape, Factor.of(self.images, "The images"), self.options)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        """By autograd, one pose after another."""
        each = [
            torch.autograd.grad(
                self.output, self.kernel, layout.only(cotangent, i), retain_graph=True
            )
            for i in range(layout.count)
        ]
        return torch.stack([row for (row,) in each])


@st.composite
def cases(draw: st.DrawFn, groups: Sequence[int] = (1, 1, 2)) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    apart = draw(st.sampled_from(groups))
    narrow, wide = apart * draw(st.integers(1, 3)), apart * draw(st.integers(1, 6))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    size, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    more = [draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True)]
    extra = tuple(more) if transposed else (0,) * dims
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    padding = tuple(draw(st.integers(0, (n - 1) // 2)) for n in reach)
    image = [draw(st.integers(n, 6)) for n in reach]
    images = torch.randn(draw(st.integers(1, 5)), narrow, *image, dtype=F64)
    shape = (narrow, wide // apart) if transposed else (wide, narrow // apart)
    kernel = torch.randn(*shape, *size, dtype=F64, requires_grad=True)
    options = stride, padding, dilation, transposed, extra, apart
    return Case(images, kernel, options, torch.convolution(images, kernel, None, *options))


@st.composite
def layouts(draw: st.DrawFn, images: int) -> Layout:
    """Images of poses one after another, in turn, or of any."""
    each = draw(st.sampled_from([n for n in (1, 2, 3) if images % n == 0]))
    if draw(st.booleans()):
        stride = draw(st.sampled_from([1, each]))
        return Layout.regular(images // each, 0, images, stride, None)
    return Layout.along(images // each, 0, torch.randint(NOBODY, images // each, (images,)))


@given(data=st.data(), case=cases())
def test_kernels_of_any_kind_have_the_rows_of_autograd(data: st.DataObject, case: Case) -> None:
    layout, form = data.draw(layouts(len(case.images))), case.form
    b, c = torch.randn(2, *case.output.shape, dtype=F64)
    b, c = (x - layout.only(x, NOBODY) for x in (b, c))
    rows, others = case.rows(b, layout), case.rows(c, layout)
    flat = rows.flatten(1)

    torch.testing.assert_close(form.rows(b, layout), rows)
    wide = torch.full((len(flat), flat.shape[1] + 2), torch.nan, dtype=F64)
    form.write_rows(b, layout, wide[:, 1:-1].view(rows.shape))
    torch.testing.assert_close(wide[:, 1:-1], flat)
    weights = torch.linspace(-1, 2, layout.count, dtype=F64)
    combined = form.vjp(layout.weigh(b, weights))
    torch.testing.assert_close(combined, torch.einsum("m...,m->...", rows, weights))
    squares = form.squares(b, layout, Products())
    if squares is not None:  # else rows are cheaper, or cancel
        torch.testing.assert_close(squares, flat.square().sum(1))
    if case.options[-1] == 1:
        found = form.inner(b, c, layout, Products())
        torch.testing.assert_close(found, flat @ others.flatten(1).mT)
        itself = form.inner(b, b, layout, Products())
        if itself is not None:  # else the rows of a pose cancel
            torch.testing.assert_close(itself, flat @ flat.mT)


@pytest.mark.parametrize("gathers", [False, True])
@given(case=cases(groups=(1,)))
def test_products_of_positions_are_those_of_rows(gathers: bool, case: Case) -> None:
    form, (height, width) = case.form, case.kernel.shape[:2]
    layout = Layout.regular(len(case.images), 0, len(case.images), 1, None)
    b = torch.randn(case.output.shape, dtype=F64)
    sides = (b, case.images) if case.options[3] else (case.images, b)
    windows = form.windows(b.shape)
    images = Images.of(Way.by(windows, gathers, width, height), windows, *sides)
    rows = case.rows(b, layout).flatten(1)

    gram, sizes = images.gramian(images)
    torch.testing.assert_close(gram, rows @ rows.mT)
    assert sizes is not None
    assert bool((sizes * (1 + 1e-9) >= gram.diagonal()).all())
    squares = images.squares(1)
    if squares is not None:  # else positions cancel
        torch.testing.assert_close(squares, rows.square().sum(1))


def _form(
    poses: int, kernel: tuple[int, ...], side: int, groups: int = 1
) -> tuple[Convolution, Tensor, Layout]:
    """A convolution that keeps the size of its images, its cotangents, and one image a pose."""
    height, width, *size = kernel
    options = (1, 1), tuple(n // 2 for n in size), (1, 1), False, (0, 0), groups
    images = torch.randn(poses, width * groups, side, side)
    form = Convolution(torch.Size(kernel), Factor.of(images, "The images"), options)
    layout = Layout.regular(poses, 0, poses, 1, None)
    return form, torch.randn(poses, height, side, side), layout


def test_products_of_positions_are_taken_where_kernels_are_large_and_positions_few() -> None:
    for kernel, side in (((512, 512, 3, 3), 2), ((512, 512, 3, 3), 4), ((256, 256, 3, 3), 8)):
        form, b, layout = _form(2, kernel, side)
        assert form.squares(b, layout, Products()) is not None, (kernel, side)
        assert form.prefers_pairs(b.shape, layout, 1), (kernel, side)
    for kernel, side in (((32, 32, 3, 3), 16), ((64, 64, 3, 3), 32)):
        form, b, layout = _form(2, kernel, side)
        assert form.squares(b, layout, Products()) is None, (kernel, side)
        assert not form.prefers_pairs(b.shape, layout, 1), (kernel, side)


@pytest.mark.parametrize(("side", "kernel"), [(2, 3), (4, 3), (8, 3), (4, 1)])
def test_products_of_positions_hold_less_than_rows(side: int, kernel: int) -> None:
    form, b, layout = _form(4, (256, 256, kernel, kernel), side)
    rows = 4 * form.shape.numel() * 4
    with peak_live_bytes() as norms:
        assert form.squares(b, layout, Products()) is not None
    with peak_live_bytes() as gramian:
        form.inner(b, b, layout, Products())
    assert max(norms.bytes, gramian.bytes) < rows


@pytest.mark.parametrize("kernel", [(256, 64, 3, 3), (256, 64, 1, 1), (16, 64, 3, 3)])
def test_rows_hold_little_beside_themselves(kernel: tuple[int, ...]) -> None:
    form, b, layout = _form(4, kernel, 8)
    with peak_live_bytes() as peak:
        form.rows(b, layout)
    assert peak.bytes < 1.6 * 4 * form.shape.numel() * 4


def test_deep_kernels_have_the_rows_of_autograd() -> None:
    form, b, layout = _form(3, (8, 1, 5, 5), 12, groups=8)
    expected = torch.stack([form.double().vjp(layout.only(b, i).double()) for i in range(3)])
    for cotangent in (b, b.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(form.rows(cotangent, layout), expected.float())


@pytest.mark.parametrize("mean", [1.0, 10.0, 100.0])
def test_positions_whose_gradients_cancel_lose_no_digits(mean: float) -> None:
    """Pixels alike but for noise, under cotangents that add up to nothing."""
    x, layer = mean + torch.randn(4, 128, 6, 6), nn.Conv2d(128, 128, 3, bias=False)
    factors = torch.randn(4, 128, 4, 4)
    factors -= factors.mean((2, 3), keepdim=True)
    jacobian = Engine(layer, check="never").jacobian((layer(x) * factors).sum((1, 2, 3)))
    with torch.no_grad():
        patches = nn.functional.unfold(x.double(), 3)
        rows = (factors.double().flatten(2) @ patches.mT).flatten(1)
    exact, lengths = rows @ rows.mT, rows.norm(dim=1)

    norms = jacobian.norms().double()
    gram = jacobian.gramian().double() / torch.outer(lengths, lengths)
    torch.testing.assert_close(norms / lengths, torch.ones_like(norms), rtol=0, atol=1e-4)
    torch.testing.assert_close(gram, exact / torch.outer(lengths, lengths), rtol=0, atol=1e-4)


class _Pyramid(nn.Module):
    """From many places and few channels to few places and many channels, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 96, 3, stride=2, padding=1)]
        )
        self.deep = nn.Conv2d(96, 96, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(96, 64, 2, stride=2)
        self.last = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.down:
            x = nn.functional.avg_pool2d(layer(x), 2).tanh()
        return self.last(self.up(self.deep(x)).tanh()).square().mean((1, 2, 3))


def test_a_network_of_kernels_of_all_kinds_agrees_with_autograd() -> None:
    network, x = _Pyramid().double(), torch.randn(3, 3, 16, 16, dtype=F64)
    leaves = list(network.parameters())
    output = network(x)
    each = [torch.autograd.grad(y, leaves, retain_graph=True) for y in output]
    rows = torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in each])
    jacobian = Engine(network).jacobian(network(x))
    assert set(sum(jacobian.paths.values(), ())) <= {
        "closed form (Convolution)",
        "closed form (Elementwise)",
    }

    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT)
    torch.testing.assert_close(jacobian.norms(), rows.norm(dim=1))
    torch.testing.assert_close(jacobian.matrix(), rows)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    combined = torch.cat([g.flatten() for g in jacobian.combine(weights).values()])
    torch.testing.assert_close(combined, weights @ rows)
