"""How operators move the dimension of poses, from their output to their arguments.

Each is a `Move`. It holds whatever numbers flow, so it errs on one side: None where poses may mix.
"""

from math import prod

import torch
from torch import Tensor

from posegrad.graph._layouts import Facts, Move, dim_of, layout_in
from posegrad.jacobian import Layout

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


def aligned(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Element by element; what is broadcast along the poses meets them all."""
    dim = layout.dim - (len(out) - len(inside))
    return layout.moved(dim) if dim >= 0 and inside[dim] == out[layout.dim] else None


def viewed(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The same numbers in the same order."""
    if out.numel() != inside.numel():
        return None
    behind = prod(out[layout.dim + 1 :])
    if layout.pattern is not None:
        return layout_in(inside, layout.pattern[1] * behind, layout.count, layout.device)
    for dim, size in enumerate(inside):
        owners = _viewed_owners(layout.owners, behind, size, prod(inside[dim + 1 :]))
        if owners is not None:
            return layout.owned(dim, owners)
    return None


def _viewed_owners(owners: Tensor, behind: int, size: int, after: int) -> Tensor | None:
    """Owners along a dimension of another view of the same numbers; None if poses lie otherwise.

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
    if behind % after == 0 and size * after % (count * behind) == 0:  # it lies in the other
        each = owners.repeat_interleave(behind // after)
        return each.repeat(size // len(each))
    if size > 1 and after % behind == 0 and count * behind % (size * after) == 0:
        parts = owners.reshape(-1, size, after // behind)
        alike = bool((parts == parts[:1, :, :1]).all())
        return parts[0, :, 0] if alike else None
    return None


def transposed(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Two dimensions change places."""
    first, second = (dim_of(dim, len(out)) for dim in facts)
    return layout.moved({first: second, second: first}.get(layout.dim, layout.dim))


def flipped(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The transpose of a matrix."""
    return layout.moved(len(out) - 1 - layout.dim)  # of at most two dimensions


def permuted(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The dimensions in another order."""
    return layout.moved(dim_of(facts[0][layout.dim], len(out)))


def reduced(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A sum, mean or norm over other dimensions."""
    dims = facts[0] if isinstance(facts[0], tuple | list) else facts
    gone = {dim_of(dim, len(inside)) for dim in dims if dim is not None}
    if not gone:
        return None
    if len(inside) == len(out):  # keepdim
        return None if layout.dim in gone else layout
    return layout.moved([dim for dim in range(len(inside)) if dim not in gone][layout.dim])


def along(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """An operator that mixes the entries of one dimension, which must not be that of poses."""
    apart = len(out) == len(inside) and dim_of(facts[0], len(out)) != layout.dim
    return layout if apart and inside[layout.dim] == out[layout.dim] else None


def rotated(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`rot90`: two dimensions change places, one of them backwards."""
    dims, times = facts
    first, second = (dim_of(dim, len(out)) for dim in dims)
    if layout.dim not in (first, second) or times % 4 == 0:
        return layout
    kept = {1: (second, first), 3: (first, second)}.get(times % 4)
    return layout.moved(kept[1]) if kept and layout.dim == kept[0] else None


def repeated(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Copies behind each other; poses keep apart if each copy holds them all."""
    dim = layout.dim - (len(out) - len(inside))
    if dim < 0 or inside[dim] == out[layout.dim]:
        return aligned(facts, arg, layout, out, inside)
    if layout.pattern is None or inside[dim] % (layout.pattern[1] * layout.count):
        return None
    return layout.patterned(inside[dim], layout.pattern[1]).moved(dim)


def selected(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """One entry of a dimension, which is gone in the output; also each output of unbind."""
    return layout.moved(layout.dim + (layout.dim >= dim_of(facts[0], len(inside))))


def stacked(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Tensors behind each other, along a new dimension."""
    new = dim_of(facts[0], len(out))
    return None if layout.dim == new else layout.moved(layout.dim - (layout.dim > new))


def padded(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Numbers are added before and behind, along other dimensions than that of poses."""
    (pads,) = facts  # two for each dimension, the last one first
    own = 2 * (len(out) - 1 - layout.dim)
    return None if any(pads[own : own + 2]) else layout


def layer_norm(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Statistics of the last dimensions, then a scale and a shift of their shape."""
    if arg > 0:
        return aligned(facts, arg, layout, out, inside)
    return layout if layout.dim < len(out) - len(facts[0]) else None


def layer_norm_backward(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The backward of a layer norm: from its input and its output's gradient to its input's."""
    return layout if out == inside and layout.dim < len(out) - len(facts[0]) else None


def batch_norm(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Channels never mix; nothing does unless the statistics are the batch's."""
    if arg > 0:  # scale and shift, [C]
        return layout.moved(0) if layout.dim == 1 else None
    return layout if layout.dim == 1 or facts[0] is False else None


def put_in(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """One entry of a dimension is replaced by another tensor, which lacks the dimension."""
    if arg == 0:
        return layout
    return stacked(facts, arg, layout, out, inside)


def attention(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Scaled dot products of `[N, heads, T, d]`."""
    alone = (
        arg < 3 and layout.dim < 2 and len(inside) == 4 and inside[layout.dim] == out[layout.dim]
    )
    return layout if alone else None


def along_each(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """An operator along several dimensions, or, if it names none, along all."""
    dims = {dim_of(dim, len(out)) for dim in facts[0] or ()}
    apart = len(out) == len(inside) and bool(dims) and layout.dim not in dims
    return layout if apart and inside[layout.dim] == out[layout.dim] else None


def within_last(count: int) -> Move:
    """An operator that mixes some last dimensions, as one that pools or resizes images."""

    def move(
        facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
    ) -> Layout | None:
        apart = len(out) == len(inside) and layout.dim < len(out) - count
        return layout if apart and inside[layout.dim] == out[layout.dim] else None

    return move


def first_alone(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Operators that treat every entry of dimension 0 alone, whatever they do to the others."""
    return layout if layout.dim == 0 and len(inside) > 0 and inside[0] == out[0] else None


def classes(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """One entry of dimension 1 is picked for each of the others: `[N, C, ...]` to `[N, ...]`."""
    if arg > 0 or len(inside) != len(out) + 1:
        return None
    return layout.moved(layout.dim + (layout.dim > 0))


def sequences(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """From `[T, N, C]` to `[N]` or `[N, ...]`."""
    alone = arg == 0 and layout.dim == 0 and len(inside) == 3 and inside[1] == out[0]
    return layout.moved(1) if alone else None


def same_front(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A last dimension comes or goes, as that of complex numbers seen as pairs."""
    kept = layout.dim < min(len(out), len(inside)) and inside[layout.dim] == out[layout.dim]
    return layout if kept else None


def windows(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`x.unfold(dim, size, step)`: windows over one dimension, in a new last one."""
    apart = layout.dim < len(inside) and layout.dim != dim_of(facts[0], len(inside))
    return layout if apart else None


def diagonal(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """Two dimensions become the last one, entry by entry; only the diagonal reaches the output."""
    gone = [dim_of(dim, len(inside)) for dim in facts[:2]]
    kept = [dim for dim in range(len(inside)) if dim not in gone]
    if layout.dim < len(kept):
        return layout.moved(kept[layout.dim])
    whole = [dim for dim in gone if inside[dim] == layout.size]  # so it starts at entry 0
    return layout.moved(whole[0]) if whole else None
