r"""Operators that pick or add up rows by number: the owners follow the numbers.

In a graph network, messages take the rows of their atoms and atoms add up their messages. If
message e is row :math:`s_e` of the atoms, the cotangent of atom a is the sum of those of its
messages, so it belongs to their owner if they have only one. The numbers alone show that, whatever
values flow.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import holds, saved
from posegrad.graph._layouts import dim_of
from posegrad.jacobian import NOBODY, Layout

__all__ = ["IndexMove", "Memo", "added", "added_each", "picked", "picked_each"]

NumberMove = Callable[[Layout, Tensor, int], Layout | None]
"""From an output's layout, the numbers `[E]` and the argument's size to the argument's layout."""

Memo = dict[Hashable, tuple[Layout, Tensor, Layout | None]]
"""What was found for layouts and indices of one graph; the layers of a network share them."""

IndexMove = Callable[[Node, int, Layout, torch.Size, torch.Size, Memo], Layout | None]
"""As `_layouts.Move`, but it looks at the numbers the operator saved.

Raises `UntoldError` if this torch does not save them.
"""


def picked(
    node: Node, arg: int, layout: Layout, out: torch.Size, inside: torch.Size, memo: Memo
) -> Layout | None:
    """`out = x.index_select(dim, index)`, and `x[index]`."""
    dim, index = _numbers(node, out)
    if index is None:
        return _picked_by_several(node, layout, out, inside)
    if _replaced(inside, dim, len(index)) != out:
        return None
    if layout.is_whole:
        layout = layout.owned(dim, layout.to(index.device).owners.expand(len(index)))
    return layout if dim != layout.dim else _known(memo, _gathered, layout, index, inside[dim])


def _picked_by_several(
    node: Node, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`x[i, j]`, and `x[mask]`: picked by one number for each of some neighbouring dimensions."""
    indices: tuple[Tensor | None, ...] = saved(node, "indices") if holds(node, "indices") else ()
    mask = indices[0] if len(indices) == 1 else None
    if mask is not None and mask.dtype == torch.bool:
        indices = mask.nonzero(as_tuple=True)
    found = [one for one in indices if one is not None]
    given = [dim for dim, one in enumerate(indices) if one is not None]
    if len(given) < 2 or layout.is_whole:
        return None
    first = given[0]
    alike = all(one.shape == found[0].shape and one.ndim == 1 for one in found)
    numbers = all(one.dtype in (torch.int64, torch.int32) for one in found)
    behind = first + len(given)
    if not alike or not numbers or given != [*range(first, behind)]:
        return None
    if (*inside[:first], len(found[0]), *inside[behind:]) != tuple(out):
        return None
    if layout.dim != first:
        return layout if layout.dim < first else layout.moved(layout.dim + len(given) - 1)
    for dim, index in zip(given, found, strict=True):
        moved = _gathered(layout.moved(dim), index, inside[dim])
        if moved is not None:
            return moved
    return None


def picked_each(
    node: Node, arg: int, layout: Layout, out: torch.Size, inside: torch.Size, memo: Memo
) -> Layout | None:
    """`out = x.gather(dim, index)`."""
    dim, index = _numbers_each(node, out)
    if index is None or len(inside) != len(out):
        return None
    return _along(memo, _gathered, layout, dim, index, out, inside)


def added(
    node: Node, arg: int, layout: Layout, out: torch.Size, inside: torch.Size, memo: Memo
) -> Layout | None:
    """`out = x.index_add(dim, index, source)` and the like: row e goes to row `index[e]`."""
    if arg == 0:
        return layout
    dim, index = _numbers(node, out)
    if index is None or inside != _replaced(out, dim, len(index)):
        return None  # a source that is broadcast may meet several poses
    return layout if dim != layout.dim else _known(memo, _spread, layout, index, len(index))


def added_each(
    node: Node, arg: int, layout: Layout, out: torch.Size, inside: torch.Size, memo: Memo
) -> Layout | None:
    """`out = x.scatter_add(dim, index, source)`, `scatter_reduce`."""
    if arg == 0:
        return layout
    dim, index = _numbers_each(node, out)
    if index is None or inside != index.shape:
        return None
    return _along(memo, _spread, layout, dim, index, out, inside)


def _along(
    memo: Memo,
    move: NumberMove,
    layout: Layout,
    dim: int,
    index: Tensor,
    out: torch.Size,
    inside: torch.Size,
) -> Layout | None:
    """What an index with a number for each element does to poses; along other dimensions they stay.

    Returns:
        None if poses may mix.
    """
    if dim != layout.dim:
        return layout if inside[layout.dim] == out[layout.dim] else None
    vector = _vector(index, dim)
    return None if vector is None else _known(memo, move, layout, vector, inside[dim])


def _numbers(node: Node, out: torch.Size) -> tuple[int, Tensor | None]:
    """The dimension and the row numbers `[E]` of an indexing operator, if it has one such index."""
    if not holds(node, "indices"):
        index, dim = saved(node, "index"), saved(node, "dim")
    else:
        indices = saved(node, "indices") or ()
        given = [place for place, one in enumerate(indices) if one is not None]
        if len(given) != 1:
            return 0, None
        index, dim = indices[given[0]], given[0]
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32, torch.bool) or not out:
        return 0, None
    if index.dtype == torch.bool:
        index = index.nonzero().squeeze(1)
    return dim_of(dim, len(out)), index


def _numbers_each(node: Node, out: torch.Size) -> tuple[int, Tensor | None]:
    """The dimension and the row numbers of an operator that has one for each element."""
    index = saved(node, "index")
    if index is None or index.numel() == 0 or index.ndim != len(out):
        return 0, None
    return dim_of(saved(node, "dim"), len(out)), index


def _replaced(shape: torch.Size, dim: int, size: int) -> torch.Size:
    return torch.Size([*shape[:dim], size, *shape[dim + 1 :]])


def _vector(index: Tensor, dim: int) -> Tensor | None:
    """`[E]` of an index that is the same along all other dimensions."""
    vector = index
    for other in reversed(range(index.ndim)):
        if other != dim:
            first = vector.narrow(other, 0, 1)
            if vector.stride(other) != 0 and not torch.equal(vector, first.expand_as(vector)):
                return None
            vector = first.squeeze(other)
    return vector


def _known(memo: Memo, move: NumberMove, layout: Layout, index: Tensor, size: int) -> Layout | None:
    """What a move says, asked once for each layout and index."""
    place = index.data_ptr(), index.dtype, index.shape, index.stride()
    key = move, place, layout.count, layout.dims, layout.pattern, id(layout.stated), size
    if key not in memo:
        moved = move(layout, index, size)
        memo[key] = layout, index, moved  # held, so that no other gets its address
    return memo[key][2]


def _gathered(layout: Layout, index: Tensor, size: int) -> Layout | None:
    """Rows that were picked: each belongs to the owner of all its copies."""
    copies = layout.to(index.device).owners  # [E]
    live = copies != NOBODY
    if not bool(live.all()):
        index, copies = index[live], copies[live]
    index = torch.where(index < 0, index + size, index)
    owners = torch.full((size,), NOBODY, device=index.device).scatter_(0, index, copies)
    if not torch.equal(owners[index], copies):
        return None  # copies with several owners
    return layout.owned(layout.dim, owners)


def _spread(layout: Layout, index: Tensor, size: int) -> Layout:
    """Rows that were added up: each belongs to the owner of the sum it went into."""
    return layout.owned(layout.dim, layout.to(index.device).owners[index])
