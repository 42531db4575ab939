"""From a node of the graph to the closed form of one of its arguments.

An operator's node holds what its backward needs; the formulas of `jacobian/layers` need no more.
Reading nodes instead of hooking modules finds every use alike, whatever Python called the operator.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad.capture._compat import dtype_of, saved, shape_of
from posegrad.jacobian import ClosedForm, Factor
from posegrad.jacobian.layers import (
    BatchedLinear,
    Bilinear,
    Convolution,
    Elementwise,
    Embedding,
    EmbeddingBag,
    Linear,
    NormScale,
    Repeat,
    Vector,
)

__all__ = ["TRANSPARENT", "is_readable", "read"]

Reader = Callable[[Node, torch.Size, bool, str], ClosedForm | None]
"""From the node, the parameter's shape, whether a transpose lies between, and a description."""

TRANSPARENT = {"TBackward0", "ToCopyBackward0"}
"""Between a parameter and its use: a transpose, a cast. The gradient is the same numbers."""


def is_readable(kind: str, argument: int) -> bool:
    """Whether there is a closed form for this argument of this kind of node."""
    return (kind, argument) in _READERS


def read(
    node: Node, argument: int, shape: torch.Size, *, transposed: bool, what: str
) -> ClosedForm | None:
    """The closed form of one use, or None if this use is special.

    Args:
        node: The operator.
        argument: Which of its arguments the parameter is.
        shape: The parameter's shape.
        transposed: Whether its transpose entered.
        what: The parameter's name, for messages.
    """
    if dtype_of(node)[0].is_complex:
        return None  # the formulas here are those of real numbers
    return _READERS[node.name(), argument](node, shape, transposed, f"The input beside {what}")


def _product(argument: str, *, on_left: bool, has_scale: bool) -> Reader:
    def reader(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
        other = saved(node, argument)
        scale = saved(node, "alpha") if has_scale else 1.0
        if not isinstance(other, Tensor) or other.layout != torch.strided:
            return None
        # On the right the operator's own operand is [d, p], W transposed.
        flipped = transposed if on_left else not transposed
        return Linear(shape, Factor.of(other, what), flipped, on_left, float(scale))

    return reader


def _sum(*, name: str | None = None, sign: float = 1.0) -> Reader:
    def reader(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
        factor = sign * (float(saved(node, name)) if name else 1.0)
        return _elementwise(node, shape, transposed, factor)

    return reader


def _scaled_by(operand: str, *, inverse: bool = False) -> Reader:
    def reader(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
        other = saved(node, operand)
        if not isinstance(other, Tensor):
            return None
        if inverse:
            other = other.to(dtype_of(node)[0]).reciprocal()
        factor = Factor.of(other, what)
        return _elementwise(node, shape, transposed, factor)

    return reader


def _denominator(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    above, below = saved(node, "self"), saved(node, "other")
    if not isinstance(above, Tensor) or not isinstance(below, Tensor):
        return None
    above, below = above.to(dtype_of(node)[0]), below.to(dtype_of(node)[0])
    return _elementwise(node, shape, transposed, Factor.of(-above / below.square(), what))


def _elementwise(
    node: Node, shape: torch.Size, transposed: bool, factor: Factor | float
) -> ClosedForm | None:
    out = shape_of(node)[0]
    if transposed or len(shape) > len(out):
        return None
    aligned = torch.Size([1] * (len(out) - len(shape)) + list(shape))
    return Elementwise(shape, aligned, factor)


def _kernel(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    images = saved(node, "input")
    if transposed or not isinstance(images, Tensor):
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = tuple(_plain(saved(node, name)) for name in names)
    return Convolution(shape, Factor.of(images, what), options)


def _channel_bias(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    spatial = len(shape_of(node)[0]) - 2
    return Elementwise(shape, torch.Size([1, *shape, *[1] * spatial]), 1.0)


def _batched_product(argument: str, *, on_left: bool, has_scale: bool) -> Reader:
    def reader(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
        other = saved(node, argument)
        scale = float(saved(node, "alpha")) if has_scale else 1.0
        if transposed or not isinstance(other, Tensor) or other.layout != torch.strided:
            return None
        return BatchedLinear(shape, Factor.of(other, what), on_left, scale)

    return reader


def _vector(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    matrix = saved(node, "self")
    return Vector(shape, Factor.of(matrix, what)) if isinstance(matrix, Tensor) else None


def _between_two(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    """Of `F.bilinear`, which is a sum over two dimensions of a product of three tensors."""
    told = tuple(saved(node, name) for name in ("expand1", "expand2", "expand3", "sumdim"))
    first, second = saved(node, "i1"), saved(node, "i3")
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    if transposed or not tensors or told != ((1, 3), (0,), (1, 2), (2, 3)):
        return None
    return Bilinear(shape, Factor.of(first, what), Factor.of(second, what))


def _slope(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    """Of PReLU, for numbers below zero."""
    x = saved(node, "self")
    if not isinstance(x, Tensor):
        return None
    return _elementwise(node, shape, transposed, Factor.of(x.clamp(max=0), what))


def _copies(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    repeats = tuple(saved(node, "repeats"))
    return None if transposed or 0 in repeats else Repeat(shape, repeats)


def _table(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    if saved(node, "scale_grad_by_freq") or transposed:
        return None  # frequencies are counted over all poses of the batch
    indices = Factor.of(saved(node, "indices"), what)
    return Embedding(shape, _padding(node), indices)


def _bags(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    mode, scale = saved(node, "mode"), saved(node, "per_sample_weights")
    if saved(node, "scale_grad_by_freq") or transposed or mode not in (_SUM, _MEAN):
        return None
    indices, offsets, sizes = (saved(node, name) for name in ("indices", "offsets", "result2"))
    count = shape_of(node)[0][0]
    places = torch.arange(len(indices), device=indices.device)
    starts = offsets[:count].to(places.dtype)
    bags = torch.searchsorted(starts, places, right=True) - 1
    if mode == _MEAN:
        scale = sizes[bags].clamp(min=1).to(dtype_of(node)[0]).reciprocal()
    elif scale is None:
        scale = torch.ones(len(indices), dtype=dtype_of(node)[0], device=indices.device)
    found = (Factor.of(tensor, what) for tensor in (indices.long(), bags, scale))
    return EmbeddingBag(shape, _padding(node), *found)


_SUM, _MEAN = 0, 1  # modes of an embedding bag


def _padding(node: Node) -> int | None:
    padding = int(saved(node, "padding_idx"))
    return padding if padding < 2**63 else None  # -1 is saved as an unsigned number


def _picked(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    """Rows of a parameter by number, as from a table."""
    index, dim = saved(node, "index"), saved(node, "dim")
    if index is None:
        index, *others = saved(node, "indices")
        dim = 0 if all(other is None for other in others) else None
    if transposed or dim != 0 or not isinstance(index, Tensor):
        return None
    if index.dtype not in (torch.int64, torch.int32):
        return None  # a mask
    return Embedding(shape, None, Factor.of(index, what))


def _layer_scale(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    x, mean, rho = (saved(node, name) for name in ("input", "result1", "result2"))
    if not isinstance(x, Tensor):
        return None
    aligned = torch.Size([1] * (x.ndim - len(shape)) + list(shape))
    return NormScale(shape, aligned, *(Factor.of(t, what) for t in (x, mean, rho)))


def _root_mean_square_scale(
    node: Node, shape: torch.Size, transposed: bool, what: str
) -> ClosedForm | None:
    x, rho = saved(node, "input"), saved(node, "result1")
    if not isinstance(x, Tensor) or not isinstance(rho, Tensor):
        return None
    aligned = torch.Size([1] * (x.ndim - len(shape)) + list(shape))
    mean = rho.new_zeros(())
    return NormScale(shape, aligned, *(Factor.of(t, what) for t in (x, mean, rho)))


def _group_scale(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    x, *statistics = (saved(node, name) for name in ("input", "result1", "result2"))
    if not isinstance(x, Tensor):
        return None
    each = saved(node, "C") // saved(node, "group")
    spatial = [1] * (x.ndim - 2)
    mean, rho = (
        t.repeat_interleave(each, dim=1).reshape(*x.shape[:2], *spatial) for t in statistics
    )
    aligned = torch.Size([1, *shape, *spatial])
    return NormScale(shape, aligned, *(Factor.of(t, what) for t in (x, mean, rho)))


def _batch_scale(node: Node, shape: torch.Size, transposed: bool, what: str) -> ClosedForm | None:
    x, train = saved(node, "input"), saved(node, "training")
    if not isinstance(x, Tensor) or not isinstance(train, bool):
        return None
    if train:
        mean, rho = saved(node, "result1"), saved(node, "result2")
    else:
        mean = saved(node, "running_mean").clone()  # updated without a new version
        rho = (saved(node, "running_var") + saved(node, "eps")).rsqrt()
    aligned = torch.Size([1, *shape, *[1] * (x.ndim - 2)])
    mean, rho = mean.reshape(aligned), rho.reshape(aligned)
    return NormScale(shape, aligned, *(Factor.of(t, what) for t in (x, mean, rho)))


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


_READERS: dict[tuple[str, int], Reader] = {
    ("AddmmBackward0", 0): _sum(name="beta"),
    ("AddmmBackward0", 1): _product("mat2", on_left=True, has_scale=True),
    ("AddmmBackward0", 2): _product("mat1", on_left=False, has_scale=True),
    ("MmBackward0", 0): _product("mat2", on_left=True, has_scale=False),
    ("MmBackward0", 1): _product("self", on_left=False, has_scale=False),
    ("AddBackward0", 0): _sum(),
    ("AddBackward0", 1): _sum(name="alpha"),
    ("SubBackward0", 0): _sum(),
    ("SubBackward0", 1): _sum(name="alpha", sign=-1.0),
    ("MulBackward0", 0): _scaled_by("other"),
    ("MulBackward0", 1): _scaled_by("self"),
    ("DivBackward0", 0): _scaled_by("other", inverse=True),
    ("DivBackward0", 1): _denominator,
    ("BaddbmmBackward0", 0): _sum(name="beta"),
    ("BaddbmmBackward0", 1): _batched_product("batch2", on_left=True, has_scale=True),
    ("BaddbmmBackward0", 2): _batched_product("batch1", on_left=False, has_scale=True),
    ("BmmBackward0", 0): _batched_product("mat2", on_left=True, has_scale=False),
    ("BmmBackward0", 1): _batched_product("self", on_left=False, has_scale=False),
    ("MvBackward0", 1): _vector,
    ("TrilinearBackward0", 1): _between_two,
    ("PreluKernelBackward0", 1): _slope,
    ("RepeatBackward0", 0): _copies,
    ("ExpandBackward0", 0): _sum(),
    ("ConvolutionBackward0", 1): _kernel,
    ("ConvolutionBackward0", 2): _channel_bias,
    ("EmbeddingBackward0", 0): _table,
    ("EmbeddingBagBackward0", 0): _bags,
    ("IndexBackward0", 0): _picked,
    ("IndexSelectBackward0", 0): _picked,
    ("FusedRmsNormBackward0", 1): _root_mean_square_scale,
    ("NativeLayerNormBackward0", 1): _layer_scale,
    ("NativeLayerNormBackward0", 2): _sum(),
    ("NativeGroupNormBackward0", 1): _group_scale,
    ("NativeGroupNormBackward0", 2): _channel_bias,
    ("NativeBatchNormBackward0", 1): _batch_scale,
    ("NativeBatchNormBackward0", 2): _channel_bias,
}
