"""Closed forms of every kind, each with a cotangent, and owners of its rows to draw."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from posegrad.jacobian import NOBODY, ClosedForm, Factor, Layout
from posegrad.jacobian.layers import (
    Activation,
    BatchedLinear,
    Bilinear,
    Convolution,
    Distances,
    Elementwise,
    Embedding,
    EmbeddingBag,
    Linear,
    NormScale,
    NormScaleBackward,
    Repeat,
    Vector,
)
from tests.drawing import double

__all__ = ["CASES", "SCALED", "Case", "alive", "owners"]


@dataclass
class Case:
    """A form, a cotangent, and which dimension of it counts rows."""

    form: ClosedForm
    cotangent: Tensor
    dim: int


def _factor(tensor: Tensor) -> Factor:
    return Factor.of(tensor, "The input")


def _linear(
    rows: int,
    *,
    flipped: bool = False,
    on_left: bool = False,
    scale: float = 1.0,
    width: int = 2,
) -> Case:
    a, b = double(rows, 3), double(rows, width)
    a, b = (a.mT, b.mT) if on_left else (a, b)
    shape = torch.Size((3, width) if flipped else (width, 3))
    return Case(Linear(shape, _factor(a), flipped, on_left, scale), b, int(on_left))


def _activation(rows: int, *, dim: int = 0) -> Case:
    b = double(*((rows, 4) if dim == 0 else (4, rows)))
    return Case(Activation(b.shape), b, dim)


def _elementwise(rows: int, shape: tuple[int, ...], aligned: tuple[int, ...], *, dim: int) -> Case:
    b = double(*(rows if d == dim else 4 for d in range(3)))
    factor = _factor(torch.randn_like(b))
    return Case(Elementwise(torch.Size(shape), torch.Size(aligned), factor), b, dim)


def _bias(rows: int, factor: float) -> Case:
    form = Elementwise(torch.Size([4]), torch.Size([1, 4]), factor)
    return Case(form, double(rows, 4), 0)


def _layer_norm(rows: int) -> Case:
    x = double(5, rows, 4)
    mean, rho = x.mean(-1, keepdim=True), x.var(-1, keepdim=True).rsqrt()
    form = NormScale(
        torch.Size([4]), torch.Size([1, 1, 4]), _factor(x), _factor(mean), _factor(rho)
    )
    return Case(form, torch.randn_like(x), 1)


def _layer_norm_backward(rows: int) -> Case:
    form = _layer_norm(rows).form
    assert isinstance(form, NormScale)
    g = _factor(double(5, rows, 4))
    backward = NormScaleBackward(form.shape, form.aligned, g, *form.factors())
    return Case(backward, double(5, rows, 4), 1)


def _selected(rows: int) -> Case:
    b = double(rows, 4)
    stops = torch.rand(rows, 4) < 0.5
    factor = _factor(torch.randn_like(b).masked_fill(stops, 0))
    form = Elementwise(torch.Size([4]), torch.Size([1, 4]), factor, _factor(stops))
    return Case(form, b, 0)


def _embedding(rows: int, *, padding: int | None = None, dim: int = 0) -> Case:
    indices = torch.randint(4, (rows, 3) if dim == 0 else (3, rows))
    form = Embedding(torch.Size([4, 2]), padding, _factor(indices))
    return Case(form, double(*indices.shape, 2), dim)


def _bags(rows: int) -> Case:
    bags = torch.arange(rows).repeat(3)[torch.randperm(3 * rows)]  # also where several are one's
    indices, scale = torch.randint(4, (3 * rows,)), double(3 * rows)
    form = EmbeddingBag(torch.Size([4, 2]), 1, _factor(indices), _factor(bags), _factor(scale))
    return Case(form, double(rows, 2), 0)


def _batched(rows: int, *, on_left: bool) -> Case:
    a, b = double(2, rows, 3), double(2, rows, 4)
    a, b = (a.mT, b.mT) if on_left else (a, b)
    shape = torch.Size((2, 4, 3) if on_left else (2, 3, 4))
    return Case(BatchedLinear(shape, _factor(a), on_left, 0.5), b, 1 + int(on_left))


def _vector(rows: int) -> Case:
    form = Vector(torch.Size([3]), _factor(double(rows, 3)))
    return Case(form, double(rows), 0)


def _bilinear(rows: int) -> Case:
    x, z = double(rows, 3), double(rows, 2)
    form = Bilinear(torch.Size([4, 3, 2]), _factor(x), _factor(z))
    return Case(form, double(rows, 4), 0)


def _distances(rows: int, p: float, *, on_left: bool = False, by_products: bool = False) -> Case:
    c = double(4, 3)
    x = torch.cat([c[:1], double(rows - 1, 3)])  # no distance
    y, b = torch.cdist(x, c, p), double(rows, 4)
    y, b = (y.mT, b.mT) if on_left else (y, b)
    form = Distances(c.shape, _factor(x), _factor(c), _factor(y), p, on_left, by_products)
    return Case(form, b, int(on_left))


def _repeat(rows: int) -> Case:
    form = Repeat(torch.Size([1, 3]), (2, rows, 2))
    return Case(form, double(2, rows, 6), 1)


def _convolution(rows: int, *, transposed: bool = False, groups: int = 1) -> Case:
    images = double(rows, 4, 6)
    options = ((1,), (1,), (1,), transposed, (0,), groups)
    form = Convolution(torch.Size([4, 4 // groups, 3]), _factor(images), options)
    return Case(form, double(rows, 4, 6), 0)


# name: from the number of rows to the case
CASES: dict[str, Callable[[int], Case]] = {
    "activation": _activation,
    "activation, pose second": lambda r: _activation(r, dim=1),
    "activation of one number": lambda r: Case(Activation(torch.Size([r])), double(r), 0),
    "linear": _linear,
    "linear, flipped": lambda r: _linear(r, flipped=True),
    "linear, on the left": lambda r: _linear(r, on_left=True, scale=-0.5),
    "linear, on the left, flipped": lambda r: _linear(r, on_left=True, flipped=True),
    "linear, wide": lambda r: _linear(r, scale=-0.5, width=5),
    "linear, wide, flipped": lambda r: _linear(r, flipped=True, width=5),
    "linear, wide, on the left": lambda r: _linear(r, on_left=True, width=5),
    "bias": lambda r: _bias(r, 1.0),
    "bias, times a number": lambda r: _bias(r, -2.0),
    "scale": lambda r: _elementwise(r, (4,), (1, 1, 4), dim=0),
    "scale, pose second": lambda r: _elementwise(r, (4, 1, 4), (4, 1, 4), dim=1),
    "scale of one number": lambda r: _elementwise(r, (), (1, 1, 1), dim=2),
    "layer norm": _layer_norm,
    "layer norm, in its backward": _layer_norm_backward,
    "picked by a mask": _selected,
    "embedding": _embedding,
    "embedding, padding": lambda r: _embedding(r, padding=1),
    "embedding, pose second": lambda r: _embedding(r, padding=0, dim=1),
    "embedding bag": _bags,
    "batched": lambda r: _batched(r, on_left=False),
    "batched, on the left": lambda r: _batched(r, on_left=True),
    "vector": _vector,
    "bilinear": _bilinear,
    "distances": lambda r: _distances(r, 2.0),
    "distances, by products": lambda r: _distances(r, 2.0, by_products=True),
    "distances, on the left": lambda r: _distances(r, 2.0, on_left=True),
    "distances, on the left, by products": lambda r: _distances(
        r, 2.0, on_left=True, by_products=True
    ),
    **{f"distances, p = {p}": partial(_distances, p=p) for p in (0.0, 1.0, 1.5, 3.0, torch.inf)},
    "repeat": _repeat,
    "convolution": _convolution,
    "convolution, groups": lambda r: _convolution(r, groups=2),
    "convolution, transposed": lambda r: _convolution(r, transposed=True),
}

# The same, of linear layers that are multiplied by a number.
SCALED: dict[str, Callable[[int], Case]] = {
    "linear, scaled": partial(_linear, scale=1.5),
    "linear, scaled, flipped": partial(_linear, scale=1.5, flipped=True),
    "linear, scaled, on the left": partial(_linear, scale=1.5, on_left=True),
    "linear, scaled, on the left, flipped": partial(_linear, scale=1.5, on_left=True, flipped=True),
}


@st.composite
def owners(draw: st.DrawFn, *, dead: bool = True) -> tuple[int, Tensor]:
    """m and the owners of rows: batch first, tiles, blocks, or any."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    count, each = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    places = torch.arange(count * each)
    kind = draw(st.sampled_from(["block", "tile", "ragged"]))
    found = {
        "block": places // each,
        "tile": places % count,
        "ragged": torch.randint(count, (draw(st.integers(1, 9)),)),
    }[kind]
    if dead and draw(st.booleans()):
        found = torch.where(torch.rand(len(found)) < 0.3, NOBODY, found)
    return count, found


def alive(tensor: Tensor, layout: Layout) -> Tensor:
    """A cotangent: rows that are nobody's are zero."""
    return tensor - layout.only(tensor, NOBODY)
