"""How operators move the dimension of poses, from their output to their arguments.

Each is a `Rule`. It holds whatever numbers flow, so it errs on one side: None where poses may mix.
"""

from math import prod

import torch
from torch import Tensor

from posegrad.graph._axis import Axis, Facts, Rule, axis_in, dim_of

__all__ = [
    "aligned",
    "along",
    "along_each",
    "attention",
    "batch_norm",
    "classes",
    "diagonal",
    "first_alone",
    "flipped",
    "layer_norm",
    "layer_norm_backward",
    "padded",
    "permuted",
    "put_in",
    "reduced",
    "repeated",
    "rotated",
    "same_front",
    "selected",
    "sequences",
    "stacked",
    "transposed",
    "viewed",
    "windows",
    "within_last",
]


def aligned(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """Element by element; what is broadcast along the poses meets them all."""
    dim = axis.dim - (len(out) - len(inside))
    return axis._replace(dim=dim) if dim >= 0 and inside[dim] == out[axis.dim] else None


def viewed(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """The same numbers in the same order."""
    if out.numel() != inside.numel():
        return None
    behind = prod(out[axis.dim + 1 :])
    if axis.owners is None:
        return axis_in(inside, axis.inner * behind, axis.poses)
    for dim, size in enumerate(inside):
        owners = _viewed_owners(axis.owners, behind, size, prod(inside[dim + 1 :]))
        if owners is not None:
            return axis.owned(dim, owners)
    return None


def _viewed_owners(owners: Tensor, behind: int, size: int, after: int) -> Tensor | None:
    """Owners along another dimension of the same numbers; None if more than it decides.

    Args:
        owners: Those along a dimension, `[n]`.
        behind: How many numbers lie between neighbours along it.
        size: The size of the other dimension.
        after: How many lie between neighbours along that one.
    """
    count = len(owners)
    if (size, after) == (count, behind):
        return owners
    if not (count and behind and size and after):
        return None
    if behind % after == 0 and size * after % (count * behind) == 0:  # it is part of the other
        each = owners.repeat_interleave(behind // after)
        return each.repeat(size // len(each))
    if size > 1 and after % behind == 0 and count * behind % (size * after) == 0:
        parts = owners.reshape(-1, size, after // behind)
        alike = bool((parts == parts[:1, :, :1]).all())
        return parts[0, :, 0] if alike else None
    return None


def transposed(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Two dimensions change places."""
    first, second = (dim_of(dim, len(out)) for dim in facts)
    return axis._replace(dim={first: second, second: first}.get(axis.dim, axis.dim))


def flipped(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """The transpose of a matrix."""
    return axis._replace(dim=len(out) - 1 - axis.dim)  # of at most two dimensions


def permuted(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """The dimensions in another order."""
    return axis._replace(dim=dim_of(facts[0][axis.dim], len(out)))


def reduced(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """A sum, mean or norm over other dimensions."""
    dims = facts[0] if isinstance(facts[0], tuple | list) else facts
    gone = {dim_of(dim, len(inside)) for dim in dims if dim is not None}
    if not gone:
        return None
    if len(inside) == len(out):  # keepdim
        return None if axis.dim in gone else axis
    return axis._replace(dim=[dim for dim in range(len(inside)) if dim not in gone][axis.dim])


def along(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """An operator that mixes the entries of one dimension, which must not be that of poses."""
    apart = len(out) == len(inside) and dim_of(facts[0], len(out)) != axis.dim
    return axis if apart and inside[axis.dim] == out[axis.dim] else None


def rotated(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """`rot90`: of the two dimensions one becomes the other, and that one backwards the first."""
    dims, times = facts
    first, second = (dim_of(dim, len(out)) for dim in dims)
    if axis.dim not in (first, second) or times % 4 == 0:
        return axis
    kept = {1: (second, first), 3: (first, second)}.get(times % 4)
    return axis._replace(dim=kept[1]) if kept and axis.dim == kept[0] else None


def repeated(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Copies behind each other; poses keep apart if each copy holds them all."""
    dim = axis.dim - (len(out) - len(inside))
    if dim < 0 or inside[dim] == out[axis.dim]:
        return aligned(facts, arg, axis, out, inside)
    if axis.owners is not None or inside[dim] % (axis.inner * axis.poses):
        return None
    return axis._replace(dim=dim, size=inside[dim])


def selected(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """One entry of a dimension that is gone; also each output of unbind."""
    return axis._replace(dim=axis.dim + (axis.dim >= dim_of(facts[0], len(inside))))


def stacked(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """Tensors behind each other, along a new dimension."""
    new = dim_of(facts[0], len(out))
    return None if axis.dim == new else axis._replace(dim=axis.dim - (axis.dim > new))


def padded(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """Numbers are added before and behind; not along the poses."""
    (pads,) = facts  # two for each dimension, the last one first
    own = 2 * (len(out) - 1 - axis.dim)
    return None if any(pads[own : own + 2]) else axis


def layer_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Statistics of the last dimensions, then a scale and a shift of their shape."""
    if arg > 0:
        return aligned(facts, arg, axis, out, inside)
    return axis if axis.dim < len(out) - len(facts[0]) else None


def layer_norm_backward(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """The gradient of what was normalised, from that of the output and from what was normalised."""
    return axis if out == inside and axis.dim < len(out) - len(facts[0]) else None


def batch_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Channels never mix; nothing does unless the statistics are the batch's."""
    if arg > 0:  # scale and shift, [C]
        return axis._replace(dim=0) if axis.dim == 1 else None
    return axis if axis.dim == 1 or facts[0] is False else None


def put_in(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """One entry of a dimension is replaced by another tensor, which lacks the dimension."""
    if arg == 0:
        return axis
    return stacked(facts, arg, axis, out, inside)


def attention(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Scaled dot products of `[N, heads, T, d]`."""
    alone = arg < 3 and axis.dim < 2 and len(inside) == 4 and inside[axis.dim] == out[axis.dim]
    return axis if alone else None


def along_each(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """An operator along several dimensions, or, if it names none, along all."""
    dims = {dim_of(dim, len(out)) for dim in facts[0] or ()}
    apart = len(out) == len(inside) and bool(dims) and axis.dim not in dims
    return axis if apart and inside[axis.dim] == out[axis.dim] else None


def within_last(count: int) -> Rule:
    """An operator that mixes the last dimensions, so many: pools, resizes and pads images."""

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        apart = len(out) == len(inside) and axis.dim < len(out) - count
        return axis if apart and inside[axis.dim] == out[axis.dim] else None

    return rule


def first_alone(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Operators that treat every entry of dimension 0 alone, whatever they do to the others."""
    return axis if axis.dim == 0 and len(inside) > 0 and inside[0] == out[0] else None


def classes(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """One entry of dimension 1 is picked for each of the others: `[N, C, ...]` to `[N, ...]`."""
    if arg > 0 or len(inside) != len(out) + 1:
        return None
    return axis._replace(dim=axis.dim + (axis.dim > 0))


def sequences(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """From `[T, N, C]` to `[N]` or `[N, ...]`."""
    alone = arg == 0 and axis.dim == 0 and len(inside) == 3 and inside[1] == out[0]
    return axis._replace(dim=1) if alone else None


def same_front(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """What lies in the last dimension comes or goes: complex numbers as pairs, windows."""
    kept = axis.dim < min(len(out), len(inside)) and inside[axis.dim] == out[axis.dim]
    return axis if kept else None


def windows(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """`x.unfold(dim, size, step)`: windows over one dimension, in a new last one."""
    apart = axis.dim < len(inside) and axis.dim != dim_of(facts[0], len(inside))
    return axis if apart else None


def diagonal(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Two dimensions become the last one, entry by entry; only the diagonal reaches the output."""
    gone = [dim_of(dim, len(inside)) for dim in facts[:2]]
    kept = [dim for dim in range(len(inside)) if dim not in gone]
    if axis.dim < len(kept):
        return axis._replace(dim=kept[axis.dim])
    whole = [dim for dim in gone if inside[dim] == axis.size]  # so it starts with the first entry
    return axis._replace(dim=whole[0]) if whole else None
