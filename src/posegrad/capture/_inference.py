r"""Owners of rows by construction: following the dimension of poses through the graph.

Probing finds the owners of any row and costs a backward. Most graphs need no probe: if the output
`[m]` is a sum over T of `[m, T]`, and that a product of `[m, T, d]` with a weight, the dimension of
poses can be followed from operator to operator by what each operator *is*, whatever numbers flow.
An operator that is not in the table is probed alone, by its own vjp (`_probing.py`). Where poses
mix, nothing is inferred for what lies behind. Behind what belongs to one pose as a whole, so does
everything, whatever the operators are.

Rows may also be picked by number, as messages between atoms are; then owners follow the numbers
(`_indexed.py`), and are found anew for each graph.

A tensor's numbers, in row-major order, are laid out as :math:`a \times m \times b`: number n
belongs to pose :math:`\lfloor n / b \rfloor \bmod m`. Views keep b, the *stride*; other operators
move it with their dimensions (`_axis.py`).
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import NamedTuple

import torch

from posegrad._compat import UntoldError, is_packed, is_python
from posegrad.capture._axis import Axis, Facts, agreed, axis_in, dim_of
from posegrad.capture._cuts import Cut
from posegrad.capture._edges import LEAF_NAME, Edge, EdgeRegistry
from posegrad.capture._indexed import Memo
from posegrad.capture._operators import kind_of
from posegrad.capture._probing import probed_alone
from posegrad.jacobian import Arrangement

__all__ = ["Inferred", "infer"]


class Inferred(NamedTuple):
    """Where poses lie, as far as operators tell.

    Args:
        axes: By edge.
        is_fixed: Whether it holds for all graphs of the structure; else numbers were looked at.
        lost: For every other edge the operator at which poses were lost.
        alone: The operators that were probed alone.
    """

    axes: Mapping[Edge, Axis]
    is_fixed: bool
    lost: Mapping[Edge, int]
    alone: Sequence[int]


def infer(registry: EdgeRegistry, arrangement: Arrangement, generator: torch.Generator) -> Inferred:
    """The axis of poses of every edge to which it can be followed from the output.

    Args:
        registry: The graph.
        arrangement: The poses in the output.
        generator: The engine's own, for operators that are probed alone.
    """
    dim, shape = arrangement.dim, arrangement.shape
    stride = 1 if dim is None else prod(shape[dim + 1 :])
    start = axis_in(shape, stride, arrangement.poses)
    axes = {} if start is None else {registry.root: start}
    lost: dict[Edge, int] = {}  # edges at which poses may mix, and the operators that may mix them
    alone: list[int] = []
    memo: Memo = {}
    is_fixed = True
    for node in registry.in_order():
        of_outputs = {i: axes.get((node, i)) for i in registry.outputs(node)}
        known = {i: axis for i, axis in of_outputs.items() if axis is not None}
        moved: dict[int, Axis | None] = {}
        sources = _computed(registry, node)
        if sources and len(known) == len(of_outputs):
            moved, follows = _moved(registry, node, [*sources], known, generator, alone, memo)
            is_fixed &= follows
        for argument, edge in sources.items():
            if edge in lost:
                continue
            axis = moved.get(argument)
            if edge in axes:
                axis = agreed(axes.pop(edge), axis)
            if axis is None:
                before = (lost[o] for i in of_outputs if (o := (node, i)) in lost)
                lost[edge] = next(before, node)
            else:
                axes[edge] = axis
    return Inferred(axes, is_fixed, lost, alone)


def _computed(registry: EdgeRegistry, node: int) -> dict[int, Edge]:
    """The arguments of an operator that were computed by another; nothing lies behind leaves."""
    return {
        i: edge
        for i, edge in enumerate(registry.sources[node])
        if edge is not None and registry.names[edge[0]] != LEAF_NAME
    }


def _moved(
    registry: EdgeRegistry,
    node: int,
    arguments: list[int],
    axes: Mapping[int, Axis],
    generator: torch.Generator,
    alone: list[int],
    memo: Memo,
) -> tuple[dict[int, Axis | None], bool]:
    """The axes of an operator's arguments by those of its outputs, and whether structure tells.

    It is added to `alone` if it was probed.
    """
    kind, operator = kind_of(registry.names[node]), registry.nodes[node]
    if not (kind.cuts or kind.looks_up) and (first := _single(axes)) is not None:
        return dict.fromkeys(arguments, first), True
    if is_python(operator):
        return {}, True
    # Another release of torch may not save what a rule looks at.
    told = kind.moves is not None and None not in registry.facts[node]
    if not told and is_packed(operator):
        return {}, True  # what a checkpoint would have to recompute is not read
    try:
        found = {i: _by_rule(registry, node, i, axes, memo) for i in arguments}
    except UntoldError:
        if is_packed(operator):
            return {}, True
        told, found = False, dict.fromkeys(arguments, (None, False))
    moved = {i: axis for i, (axis, _) in found.items()}
    follows = all(follows for _, follows in found.values())
    if told or None not in moved.values():
        return moved, told and follows
    try:
        moved = probed_alone(registry, node, axes, generator)
    except RuntimeError:  # it cannot be called alone; what lies behind it is probed
        return {}, False
    alone.append(node)
    return moved, False


def _single(axes: Mapping[int, Axis]) -> Axis | None:
    """The axis of outputs that belong to one and the same pose as a whole, if they do."""
    one: Axis | None = next(iter(axes.values()))
    one = reduce(agreed, axes.values(), one)
    return one if one is not None and one.is_whole else None


def _by_rule(
    registry: EdgeRegistry, node: int, argument: int, axes: Mapping[int, Axis], memo: Memo
) -> tuple[Axis | None, bool]:
    """The axis of one argument, on which all outputs must agree, and whether structure tells."""
    kind, operator, facts = (
        kind_of(registry.names[node]),
        registry.nodes[node],
        registry.facts[node],
    )
    edge = registry.sources[node][argument]
    assert edge is not None
    inside, found, follows = registry.shape(edge), list[Axis | None](), True
    for number, axis in axes.items():
        out = registry.shape((node, number))
        if kind.picks is not None:
            found.append(kind.picks(operator, argument, axis, out, inside, memo))
        elif kind.moves is None or None in facts:
            continue
        elif kind.cuts is not None and out == inside:
            found.append(axis)  # all of it is cut out
        elif kind.cuts is not None and _is_cut(facts, axis, out, inside):
            sizes = [None if e is None else registry.shape(e) for e in registry.sources[node]]
            dim = dim_of(facts[0], max(len(out), len(inside)))
            cut = Cut(operator, dim, argument, number, sizes, registry.sizes[node])
            moved, follows = kind.cuts(cut, axis)
            found.append(moved)
        else:
            found.append(kind.moves(facts, argument, axis, out, inside))
    return (reduce(agreed, found) if found else None), follows


def _is_cut(facts: Facts, axis: Axis, out: torch.Size, inside: torch.Size) -> bool:
    """Whether poses lie along the dimension in which tensors are put together or cut out."""
    return axis.is_whole or (len(out) >= len(inside) and axis.dim == dim_of(facts[0], len(out)))
