"""How operators move the dimension of poses, from their output to their arguments.

Each is a `Rule`. It holds whatever numbers flow, so it errs on one side: None where poses may mix.
"""

from math import prod

import torch

from posegrad.capture._axis import Axis, Facts, Rule, axis_in, dim_of

__all__ = [
    "aligned",
    "along",
    "along_each",
    "attention",
    "batch_norm",
    "between_two",
    "classes",
    "diagonal",
    "distances",
    "first_alone",
    "flipped",
    "images",
    "layer_norm",
    "matrices",
    "outer",
    "padded",
    "permuted",
    "plus_vector",
    "product",
    "put_in",
    "reduced",
    "rows_alone",
    "same_front",
    "selected",
    "sequences",
    "stacked",
    "summed_products",
    "times_vector",
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
    places = [d for d in range(len(inside)) if prod(inside[d + 1 :]) == behind]
    kept = [d for d in places if inside[d] == axis.size]
    return axis._replace(dim=kept[0]) if kept else None


def transposed(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    first, second = (dim_of(dim, len(out)) for dim in facts)
    return axis._replace(dim={first: second, second: first}.get(axis.dim, axis.dim))


def flipped(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    return axis._replace(dim=len(out) - 1 - axis.dim)  # t(), of at most two dimensions


def permuted(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
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


def selected(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """One entry of a dimension that is gone; also each output of unbind."""
    return axis._replace(dim=axis.dim + (axis.dim >= dim_of(facts[0], len(inside))))


def stacked(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    new = dim_of(facts[0], len(out))
    return None if axis.dim == new else axis._replace(dim=axis.dim - (axis.dim > new))


def product(left: int, right: int) -> Rule:
    """A matrix product: poses lie in rows of the left operand or in columns of the right."""

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        if arg not in (left, right):
            return aligned(facts, arg, axis, out, inside)  # the summand of addmm
        batched = axis.dim < len(out) - 2
        own = len(out) - (2 if arg == left else 1)
        return axis if batched or axis.dim == own else None

    return rule


def images(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """Operators on `[N, ...]` that treat every entry of N alone."""
    alone = arg == 0 and axis.dim == 0 and len(inside) == len(out) and inside[0] == out[0]
    return axis if alone else None


def padded(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    (pads,) = facts  # two for each dimension, the last one first
    own = 2 * (len(out) - 1 - axis.dim)
    return None if any(pads[own : own + 2]) else axis


def layer_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    apart = axis.dim < len(out) - len(facts[0])
    return axis if arg == 0 and apart else None


def batch_norm(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Channels never mix; images do if the statistics are the batch's."""
    if arg > 0:  # scale and shift, [C]
        return axis._replace(dim=0) if axis.dim == 1 else None
    return axis if axis.dim == 1 or (axis.dim == 0 and facts[0] is False) else None


def plus_vector(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A matrix times a vector, added to another."""
    return aligned(facts, arg, axis, out, inside) if arg == 0 else axis if arg == 1 else None


def rows_alone(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A matrix `[R, d]` whose rows are multiplied by this weight or by that."""
    matrices = len(out) == len(inside) == 2
    return axis if arg == 0 and matrices and axis.dim == 0 and inside[0] == out[0] else None


def outer(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """The outer product of two vectors, added to a matrix."""
    if arg == 0:
        return aligned(facts, arg, axis, out, inside)
    return axis._replace(dim=0) if axis.dim == arg - 1 else None


def summed_products(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Products of a batch of matrices, added up, and to a matrix."""
    if arg == 0:
        return aligned(facts, arg, axis, out, inside)
    return axis._replace(dim=arg) if axis.dim == arg - 1 else None


def between_two(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`F.bilinear`: from `[m, d]` and `[m, e]` to `[m, p]`."""
    plain = tuple(map(tuple, facts)) == ((1, 3), (0,), (1, 2), (2, 3))
    return first_alone(facts, arg, axis, out, inside) if plain and arg != 1 else None


def put_in(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """One entry of a dimension is replaced by another tensor, which lacks the dimension."""
    if arg == 0:
        return axis
    return stacked(facts, arg, axis, out, inside)


def times_vector(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    return axis if arg == 0 else None


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


def matrices(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """An operator on matrices `[..., n, k]`, each by itself."""
    apart = axis.dim < len(inside) - 2 and axis.dim < len(out)
    return axis if apart and inside[axis.dim] == out[axis.dim] else None


def distances(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """From `[..., n, d]` and `[..., k, d]` to `[..., n, k]`."""
    if axis.dim < len(out) - 2:
        kept = len(inside) == len(out) and inside[axis.dim] == out[axis.dim]
        return axis if kept else None
    own = axis.dim - (len(out) - 2) == arg
    return axis._replace(dim=len(inside) - 2) if own else None


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
    """Two dimensions become the last one."""
    gone = {dim_of(dim, len(inside)) for dim in facts}
    kept = [dim for dim in range(len(inside)) if dim not in gone]
    return axis._replace(dim=kept[axis.dim]) if axis.dim < len(kept) else None
