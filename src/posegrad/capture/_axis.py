"""How each kind of operator moves the dimension of poses, from its output to its arguments."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posegrad.jacobian import NOBODY, Layout

__all__ = ["FACTS", "RULES", "Axis", "Facts", "Rule", "agreed", "axis_in", "dim_of"]


class Axis(NamedTuple):
    """Where the poses of a tensor lie: in one dimension.

    Args:
        dim: The dimension.
        poses: m, their number.
        inner: How many neighbours along it belong to one pose, if its size is
            `outer * poses * inner`.
        size: Its size.
        owners: The pose of each entry along it, `[size]`, if they follow no such pattern.
    """

    dim: int
    poses: int
    inner: int
    size: int
    owners: Tensor | None = None

    def spelled(self, device: torch.device) -> Tensor:
        """The pose of each entry, `[size]`."""
        return self.layout(device).owners

    def owned(self, dim: int, owners: Tensor) -> "Axis":
        """An axis of the same poses with owners of its own."""
        return Axis(dim, self.poses, 0, len(owners), owners)

    def layout(self, device: torch.device) -> Layout:
        """The layout of a tensor with this axis."""
        if self.owners is not None:
            return Layout.along(self.poses, self.dim, self.owners.to(device))
        return Layout.regular(self.poses, self.dim, self.size, self.inner, device)


def agreed(first: Axis | None, second: Axis | None) -> Axis | None:
    """The axis of a sum of two cotangents; None if they belong to different poses somewhere."""
    if first is None or second is None or (first.dim, first.size) != (second.dim, second.size):
        return None
    named = second.owners if first.owners is None else first.owners
    if named is None:
        return first if first.inner == second.inner else None
    one, other = first.spelled(named.device), second.spelled(named.device)
    alike = (one == other) | (one == NOBODY) | (other == NOBODY)
    return first.owned(first.dim, torch.maximum(one, other)) if bool(alike.all()) else None


Facts = tuple[Any, ...]
"""What an operator was told beside tensors: dimensions, paddings; in the order of `FACTS`."""

Rule = Callable[[Facts, int, Axis, torch.Size, torch.Size], Axis | None]
"""From an operator's facts, the number of an argument, the axis of the output, and the shapes of
output and argument to the axis of the argument. None if poses may mix there, or meet it all.

A rule sees no tensor, so what it says holds for every graph of the same structure.
"""


def axis_in(shape: torch.Size, stride: int, count: int) -> Axis | None:
    """The dimension of a shape that holds poses of that stride; None if no single one does."""
    step = 1
    if 0 in shape:
        return None
    for dim in reversed(range(len(shape))):
        if shape[dim] > 1 and stride < step * shape[dim]:
            inner, rest = divmod(stride, step)
            whole = rest == 0 and shape[dim] % (inner * count) == 0
            return Axis(dim, count, inner, shape[dim]) if whole else None
        step *= shape[dim]
    return None


def _aligned(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Element by element; what is broadcast along the poses meets them all."""
    dim = axis.dim - (len(out) - len(inside))
    return axis._replace(dim=dim) if dim >= 0 and inside[dim] == out[axis.dim] else None


def _viewed(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """The same numbers in the same order."""
    if out.numel() != inside.numel():
        return None
    behind = prod(out[axis.dim + 1 :])
    if axis.owners is None:
        return axis_in(inside, axis.inner * behind, axis.poses)
    places = [d for d in range(len(inside)) if prod(inside[d + 1 :]) == behind]
    kept = [d for d in places if inside[d] == axis.size]
    return axis._replace(dim=kept[0]) if kept else None


def _transposed(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    first, second = (dim_of(dim, len(out)) for dim in facts)
    return axis._replace(dim={first: second, second: first}.get(axis.dim, axis.dim))


def _flipped(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    return axis._replace(dim=len(out) - 1 - axis.dim)  # t(), of at most two dimensions


def _permuted(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    return axis._replace(dim=dim_of(facts[0][axis.dim], len(out)))


def _reduced(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A sum, mean or norm over other dimensions."""
    dims = facts[0] if isinstance(facts[0], tuple | list) else facts
    gone = {dim_of(dim, len(inside)) for dim in dims if dim is not None}
    if not gone:
        return None
    if len(inside) == len(out):  # keepdim
        return None if axis.dim in gone else axis
    return axis._replace(dim=[dim for dim in range(len(inside)) if dim not in gone][axis.dim])


def _along(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """An operator that mixes the entries of one dimension, which must not be that of poses."""
    apart = len(out) == len(inside) and dim_of(facts[0], len(out)) != axis.dim
    return axis if apart else None


def _selected(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """One entry of a dimension that is gone; also each output of unbind."""
    return axis._replace(dim=axis.dim + (axis.dim >= dim_of(facts[0], len(inside))))


def _stacked(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    new = dim_of(facts[0], len(out))
    return None if axis.dim == new else axis._replace(dim=axis.dim - (axis.dim > new))


def _product(left: int, right: int) -> Rule:
    """A matrix product: poses lie in rows of the left operand or in columns of the right."""

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        if arg not in (left, right):
            return _aligned(facts, arg, axis, out, inside)  # the summand of addmm
        batched = axis.dim < len(out) - 2
        own = len(out) - (2 if arg == left else 1)
        return axis if batched or axis.dim == own else None

    return rule


def _images(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """Operators on `[N, ...]` that treat every entry of N alone."""
    alone = arg == 0 and axis.dim == 0 and len(inside) == len(out) and inside[0] == out[0]
    return axis if alone else None


def _padded(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    (pads,) = facts  # two for each dimension, the last one first
    own = 2 * (len(out) - 1 - axis.dim)
    return None if any(pads[own : own + 2]) else axis


def _layer_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    apart = axis.dim < len(out) - len(facts[0])
    return axis if arg == 0 and apart else None


def _batch_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Channels never mix; images do if the statistics are the batch's."""
    if arg > 0:  # scale and shift, [C]
        return axis._replace(dim=0) if axis.dim == 1 else None
    return axis if axis.dim == 1 or (axis.dim == 0 and facts[0] is False) else None


def _times_vector(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    return axis if arg == 0 else None


def _attention(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Scaled dot products of `[N, heads, T, d]`."""
    alone = arg < 3 and axis.dim < 2 and len(inside) == 4 and inside[axis.dim] == out[axis.dim]
    return axis if alone else None


def dim_of(value: int, ndim: int) -> int:
    """A dimension from 0; negative ones are saved as unsigned numbers."""
    value = value - 2**64 if value >= 2**63 else value
    return value + ndim if value < 0 else value


_ELEMENTWISE = (
    "Abs Add Celu Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expand Gelu Hardsigmoid "
    "Hardswish Hardtanh LeakyRelu Log Log1P LogSigmoid MaskedFill Maximum Minimum Mish Mul "
    "NativeDropout Neg Pow PreluKernel Reciprocal Relu Rsqrt Rsub Sigmoid Sign Silu Sin Softplus "
    "Sqrt Sub Tanh Threshold ToCopy Where"
)

RULES: dict[str, Rule] = {
    **{f"{name}Backward{i}": _aligned for name in _ELEMENTWISE.split() for i in (0, 1)},
    **dict.fromkeys(
        (
            "AliasBackward0",
            "ReshapeAliasBackward0",
            "SqueezeBackward0",
            "SqueezeBackward1",
            "SqueezeBackward2",
            "UnsafeViewBackward0",
            "UnsqueezeBackward0",
            "ViewBackward0",
        ),
        _viewed,
    ),
    "TBackward0": _flipped,
    "TransposeBackward0": _transposed,
    "TransposeBackward1": _transposed,
    "PermuteBackward0": _permuted,
    "SumBackward1": _reduced,
    "MeanBackward1": _reduced,
    "LinalgVectorNormBackward0": _reduced,
    "SoftmaxBackward0": _along,
    "LogSoftmaxBackward0": _along,
    "CumsumBackward0": _along,
    "CatBackward0": _along,
    "SliceBackward0": _along,
    "SplitBackward0": _along,
    "SplitWithSizesBackward0": _along,
    "UnsafeSplitBackward0": _along,
    "SelectBackward0": _selected,
    "UnbindBackward0": _selected,
    "StackBackward0": _stacked,
    "AddmmBackward0": _product(1, 2),
    "MmBackward0": _product(0, 1),
    "BmmBackward0": _product(0, 1),
    "BaddbmmBackward0": _product(1, 2),
    "MvBackward0": _times_vector,
    **dict.fromkeys(
        (
            "AvgPool2DBackward0",
            "AdaptiveAvgPool2DBackward0",
            "ConvolutionBackward0",
            "MaxPool2DWithIndicesBackward0",
            "NativeGroupNormBackward0",
        ),
        _images,
    ),
    "ConstantPadNdBackward0": _padded,
    "FusedRmsNormBackward0": _layer_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
}
"""By the kind of operator. What is not listed is probed."""

_TOLD: dict[Rule, tuple[str, ...]] = {
    _along: ("dim",),
    _batch_norm: ("training",),
    _layer_norm: ("normalized_shape",),
    _padded: ("pad",),
    _permuted: ("dims",),
    _reduced: ("dim",),
    _selected: ("dim",),
    _stacked: ("dim",),
    _transposed: ("dim0", "dim1"),
}

FACTS: dict[str, tuple[str, ...]] = {
    **{name: _TOLD[rule] for name, rule in RULES.items() if rule in _TOLD},
    "CudnnBatchNormBackward0": ("training",),
    "MiopenBatchNormBackward0": ("training",),
}
"""By the kind of operator, the names under which it saved what its rule looks at."""
