"""From a node of the graph to the closed form of one of its arguments.

An operator's node holds what its backward needs; the formulas of `jacobian/layers` need no more.
Reading nodes instead of hooking modules finds every use alike, whatever Python called the operator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import UntoldError, device_of, holds, saved
from posegrad.jacobian import ClosedForm, Factor
from posegrad.jacobian.layers import (
    BatchedLinear,
    Bilinear,
    Convolution,
    Distances,
    Elementwise,
    Embedding,
    EmbeddingBag,
    GroupedLinear,
    Linear,
    NormScale,
    NormScaleBackward,
    Repeat,
    Vector,
)

__all__ = [
    "Entry",
    "Operator",
    "Reader",
    "aligned_to",
    "bags",
    "batch_scale",
    "batched_factor",
    "channel_bias",
    "copies",
    "denominator",
    "distances_to",
    "experts",
    "factor",
    "form_of",
    "group_scale",
    "kernel",
    "layer_scale",
    "layer_scale_in_backward",
    "middle",
    "numbered",
    "root_mean_square_scale",
    "scaled_by",
    "slope",
    "summand",
    "table",
    "vector",
]


@final
class Operator(NamedTuple):
    """A node that computed something from a parameter.

    Args:
        node: The node.
        sizes: The sizes of its first output.
        dtype: The dtype of its first output.
        read: What was read of it so far, by name: a checkpoint hands out each tensor only once.
    """

    node: Node
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: dict[str, Any]

    def saved(self, name: str) -> Any:
        """What the node saved under a name in the forward; None if there was nothing to save.

        Raises:
            UntoldError: if nodes of its kind have no such name.
        """
        if name not in self.read:
            self.read[name] = saved(self.node, name)
        return self.read[name]


@final
class Entry(NamedTuple):
    """How a parameter enters an operator.

    Args:
        shape: The parameter's shape.
        transposed: Whether its transpose enters.
        name: Its name, for messages.
    """

    shape: torch.Size
    transposed: bool
    name: str


Reader = Callable[[Operator, Entry], ClosedForm | None]
"""From an operator and how the parameter enters it to the form; None if this use is special."""


def form_of(reader: Reader, op: Operator, entry: Entry) -> ClosedForm | None:
    """The form that a reader finds; None as well if this torch does not save what it looks for."""
    try:
        return reader(op, entry)
    except UntoldError:
        return None


def factor(argument: str, *, on_left: bool, has_scale: bool) -> Reader:
    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        other = op.saved(argument)
        scale = op.saved("alpha") if has_scale else 1.0
        if not isinstance(other, Tensor) or other.layout != torch.strided:
            return None
        # On the right the operator's own operand is [d, p], W transposed.
        flipped = entry.transposed if on_left else not entry.transposed
        return Linear(entry.shape, Factor.of(other, entry.name), flipped, on_left, float(scale))

    return reader


def summand(*, name: str | None = None, sign: float = 1.0) -> Reader:
    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        factor = sign * (float(op.saved(name)) if name else 1.0)
        return _elementwise(op, entry, factor)

    return reader


def scaled_by(operand: str, *, inverse: bool = False) -> Reader:
    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        other = op.saved(operand)
        if not isinstance(other, Tensor):
            return None
        if inverse:
            other = other.to(op.dtype).reciprocal()
        factor = Factor.of(other, entry.name)
        return _elementwise(op, entry, factor)

    return reader


def denominator(op: Operator, entry: Entry) -> ClosedForm | None:
    above, below = op.saved("self"), op.saved("other")
    if not isinstance(above, Tensor) or not isinstance(below, Tensor):
        return None
    above, below = above.to(op.dtype), below.to(op.dtype)
    return _elementwise(op, entry, Factor.of(-above / below.square(), entry.name))


def _elementwise(op: Operator, entry: Entry, factor: Factor | float) -> ClosedForm | None:
    aligned = aligned_to(op, entry)
    return None if aligned is None else Elementwise(entry.shape, aligned, factor)


def aligned_to(op: Operator, entry: Entry) -> torch.Size | None:
    """The parameter's shape with ones in front; None if it is transposed or has more dimensions."""
    missing = len(op.sizes) - len(entry.shape)
    fits = not entry.transposed and missing >= 0
    return torch.Size((1,) * missing + entry.shape) if fits else None


def kernel(op: Operator, entry: Entry) -> ClosedForm | None:
    images = op.saved("input")
    if entry.transposed or not isinstance(images, Tensor):
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = tuple([op.saved(name) for name in names])
    return Convolution(entry.shape, Factor.of(images, entry.name), options)


def channel_bias(op: Operator, entry: Entry) -> ClosedForm | None:
    spatial = len(op.sizes) - 2
    return Elementwise(entry.shape, torch.Size([1, *entry.shape, *[1] * spatial]), 1.0)


def batched_factor(argument: str, *, on_left: bool, has_scale: bool) -> Reader:
    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        other = op.saved(argument)
        scale = float(op.saved("alpha")) if has_scale else 1.0
        if entry.transposed or not isinstance(other, Tensor) or other.layout != torch.strided:
            return None
        return BatchedLinear(entry.shape, Factor.of(other, entry.name), on_left, scale)

    return reader


def vector(op: Operator, entry: Entry) -> ClosedForm | None:
    matrix = op.saved("self")
    return (
        Vector(entry.shape, Factor.of(matrix, entry.name)) if isinstance(matrix, Tensor) else None
    )


def middle(op: Operator, entry: Entry) -> ClosedForm | None:
    """The form of the weight of `F.bilinear`.

    The operator is a sum over two dimensions of a product of three tensors.
    """
    told = tuple(op.saved(name) for name in ("expand1", "expand2", "expand3", "sumdim"))
    first, second = op.saved("i1"), op.saved("i3")
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    if entry.transposed or not tensors or told != ((1, 3), (0,), (1, 2), (2, 3)):
        return None
    return Bilinear(entry.shape, Factor.of(first, entry.name), Factor.of(second, entry.name))


def distances_to(argument: str, other: str, *, on_left: bool, by_products: bool = False) -> Reader:
    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        points, x, y = op.saved(argument), op.saved(other), op.saved("result")
        tensors = all(isinstance(tensor, Tensor) for tensor in (points, x, y))
        if entry.transposed or not tensors or not len(entry.shape) == points.ndim == 2:
            return None
        p = 2.0 if by_products else float(op.saved("p"))
        x, points, y = (Factor.of(tensor, entry.name) for tensor in (x, points.clone(), y))
        return Distances(entry.shape, x, points, y, p, on_left, by_products)

    return reader


def experts(op: Operator, entry: Entry) -> ClosedForm | None:
    """A stack of weights: each serves the rows from where the one before it ends to its own end."""
    x, ends = op.saved("self"), op.saved("offs")
    tensors = isinstance(x, Tensor) and isinstance(ends, Tensor)
    if entry.transposed or not tensors or x.ndim != 2 or len(entry.shape) != 3:
        return None
    return GroupedLinear(entry.shape, Factor.of(x, entry.name), Factor.of(ends, entry.name))


def slope(op: Operator, entry: Entry) -> ClosedForm | None:
    """The slope of PReLU, by which it multiplies numbers below zero."""
    x = op.saved("self")
    if not isinstance(x, Tensor):
        return None
    return _elementwise(op, entry, Factor.of(x.clamp(max=0), entry.name))


def copies(op: Operator, entry: Entry) -> ClosedForm | None:
    repeats = tuple(op.saved("repeats"))
    return None if entry.transposed or 0 in repeats else Repeat(entry.shape, repeats)


def table(op: Operator, entry: Entry) -> ClosedForm | None:
    if op.saved("scale_grad_by_freq") or entry.transposed:
        return None  # frequencies are counted over all poses of the batch
    indices = Factor.of(op.saved("indices"), entry.name)
    return Embedding(entry.shape, _padding(op), indices)


def bags(op: Operator, entry: Entry) -> ClosedForm | None:
    mode, scale = op.saved("mode"), op.saved("per_sample_weights")
    if op.saved("scale_grad_by_freq") or entry.transposed or mode not in (_SUM, _MEAN):
        return None
    indices, offsets, sizes = (op.saved(name) for name in ("indices", "offsets", "result2"))
    count = op.sizes[0]
    places = torch.arange(len(indices), device=indices.device)
    starts = offsets[:count].to(places.dtype)
    bags = torch.searchsorted(starts, places, right=True) - 1
    if mode == _MEAN:
        scale = sizes[bags].clamp(min=1).to(op.dtype).reciprocal()
    elif scale is None:
        scale = torch.ones(len(indices), dtype=op.dtype, device=indices.device)
    found = (Factor.of(tensor, entry.name) for tensor in (indices.long(), bags, scale))
    return EmbeddingBag(entry.shape, _padding(op), *found)


_SUM, _MEAN = 0, 1  # modes of an embedding bag


def _padding(op: Operator) -> int | None:
    padding = int(op.saved("padding_idx"))
    return padding if padding < 2**63 else None  # -1 is saved as an unsigned number


def numbered(op: Operator, entry: Entry) -> ClosedForm | None:
    """Rows of a parameter by number, as from a table."""
    if holds(op.node, "indices"):
        index, *others = op.saved("indices")
        dim = 0 if all(other is None for other in others) else None
    else:
        index, dim = op.saved("index"), op.saved("dim")
    if entry.transposed or dim != 0 or not isinstance(index, Tensor):
        return None
    if index.dtype not in (torch.int64, torch.int32):
        return None  # a mask
    index = index.to(device_of(op.node))  # rows on a GPU may be picked by numbers on the CPU
    return Embedding(entry.shape, None, Factor.of(index, entry.name))


def layer_scale(op: Operator, entry: Entry) -> ClosedForm | None:
    x, mean, rho = (op.saved(name) for name in ("input", "result1", "result2"))
    if not isinstance(x, Tensor):
        return None
    aligned = torch.Size([1] * (x.ndim - len(entry.shape)) + list(entry.shape))
    return NormScale(entry.shape, aligned, *(Factor.of(t, entry.name) for t in (x, mean, rho)))


def layer_scale_in_backward(op: Operator, entry: Entry) -> ClosedForm | None:
    found = [op.saved(name) for name in ("grad_out", "input", "mean", "rstd")]
    if not all(isinstance(t, Tensor) for t in found) or entry.transposed:
        return None
    aligned = torch.Size([1] * (found[1].ndim - len(entry.shape)) + list(entry.shape))
    return NormScaleBackward(entry.shape, aligned, *(Factor.of(t, entry.name) for t in found))


def root_mean_square_scale(op: Operator, entry: Entry) -> ClosedForm | None:
    x, rho = op.saved("input"), op.saved("result1")
    if not isinstance(x, Tensor) or not isinstance(rho, Tensor):
        return None
    aligned = torch.Size([1] * (x.ndim - len(entry.shape)) + list(entry.shape))
    mean = rho.new_zeros(())
    return NormScale(entry.shape, aligned, *(Factor.of(t, entry.name) for t in (x, mean, rho)))


def group_scale(op: Operator, entry: Entry) -> ClosedForm | None:
    x, *statistics = (op.saved(name) for name in ("input", "result1", "result2"))
    if not isinstance(x, Tensor):
        return None
    each = op.saved("C") // op.saved("group")
    spatial = [1] * (x.ndim - 2)
    mean, rho = (
        t.repeat_interleave(each, dim=1).reshape(*x.shape[:2], *spatial) for t in statistics
    )
    aligned = torch.Size([1, *entry.shape, *spatial])
    return NormScale(entry.shape, aligned, *(Factor.of(t, entry.name) for t in (x, mean, rho)))


def batch_scale(op: Operator, entry: Entry) -> ClosedForm | None:
    x, train = op.saved("input"), op.saved("training")
    if not isinstance(x, Tensor) or not isinstance(train, bool):
        return None
    if train:
        mean, rho = op.saved("result1"), op.saved("result2")
    else:
        mean = op.saved("running_mean").clone()  # torch updates it without a new version
        rho = (op.saved("running_var") + op.saved("eps")).rsqrt()
    aligned = torch.Size([1, *entry.shape, *[1] * (x.ndim - 2)])
    mean, rho = mean.reshape(aligned), rho.reshape(aligned)
    return NormScale(entry.shape, aligned, *(Factor.of(t, entry.name) for t in (x, mean, rho)))
