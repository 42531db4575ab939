r"""Owners of rows by construction: following the dimension of poses through the graph.

Probing finds the owners of any row and costs a backward. Most graphs need no probe: if the output
`[m]` is a sum over T of `[m, T]`, and that a product of `[m, T, d]` with a weight, the dimension of
poses can be followed from operator to operator by what each operator *is*, whatever numbers flow.
An operator that is not in the table is probed alone, by its own vjp (`_probing.py`), unless it is
written in Python or a checkpoint holds what it saved. Where poses mix, nothing is inferred for what
lies behind. Everything behind a tensor that belongs to one pose as a whole belongs to that pose,
whatever the operators are.

Rows may also be picked by number, as messages between atoms are; then owners follow the numbers
(`_indexed.py`), and each graph is asked anew, but often says what the one before it said (`Trail`).

Where poses take turns, a tensor's numbers, in row-major order, are laid out as
:math:`a \times m \times b`: number n belongs to pose :math:`\lfloor n / b \rfloor \bmod m`. Views
keep b; other operators move poses with their dimensions (`_moves.py`). Where poses lie otherwise,
as in ragged batches, the owners along their dimension are listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import NamedTuple, final

import torch

from posegrad._torch import UntoldError, is_packed, is_python
from posegrad.graph._cuts import Cut
from posegrad.graph._edges import LEAF_NAME, Edge, EdgeRegistry
from posegrad.graph._indexed import Memo
from posegrad.graph._layouts import Facts, agreed, dim_of, layout_in
from posegrad.graph._operators import Kind, kind_of
from posegrad.graph._probing import probed_alone
from posegrad.jacobian import Arrangement, Layout

__all__ = ["Inferred", "Step", "Trail", "infer"]

_MOST_KEPT = 2**14  # owners, from one graph to the next

_Dim = int | None
_Moved = Mapping[int, Layout | None]


@final
class Inferred(NamedTuple):
    """Where poses lie, as far as operators tell.

    Args:
        layouts: By edge.
        is_fixed: Whether it holds for all graphs of the structure; else numbers were looked at.
        lost: For every other edge the operator at which poses were lost.
        alone: The operators that were probed alone.
    """

    layouts: Mapping[Edge, Layout]
    is_fixed: bool
    lost: Mapping[Edge, int]
    alone: Sequence[int]


@final
class Step(NamedTuple):
    """An operator behind which others lie.

    Args:
        node: Its number.
        kind: What is known of it.
        outputs: The numbers of its outputs that something depends on, and their edges.
        arguments: The numbers of its arguments that were computed by others, and their edges.
        is_told: Whether its kind has a move, and all that the move looks at was saved, which
            another release of torch may not do.
    """

    node: int
    kind: Kind
    outputs: tuple[tuple[int, Edge], ...]
    arguments: tuple[tuple[int, Edge], ...]
    is_told: bool


@final
class Told(NamedTuple):
    """What an operator that looks at numbers made of layouts, in one graph.

    Args:
        step: The operator.
        given: The layouts of its outputs.
        moved: Those of its arguments.
    """

    step: Step
    given: Mapping[int, Layout]
    moved: _Moved


@final
@dataclass
class Trail:
    """What following poses through one graph of a structure tells of the next.

    Where operators look at numbers, these mostly say what they said before. If they all do, so does
    the rest, and the very layouts of the earlier graph are taken, with what they have worked out.

    Args:
        steps: The structure's operators.
        is_met_again: Whether the structure was met before. In batches of ragged poses most are met
            once, and nothing is kept of them.
        fixed: What holds for all graphs of the structure, by the output's dimension of poses.
        earlier: Likewise what was found in the last graph, if numbers were looked at, and what the
            operators that look at them made of layouts there.
    """

    steps: list[Step] = field(default_factory=list)
    is_met_again: bool = False
    fixed: dict[_Dim, Inferred] = field(default_factory=dict)
    earlier: dict[_Dim, tuple[Inferred, list[Told]]] = field(default_factory=dict)

    def again(self, dim: _Dim, following: "_Following") -> Inferred | None:
        """What was found in the last graph, if it holds for this one too."""
        found, told = self.earlier.get(dim, (None, ()))
        return found if all(following.says_again(one) for one in told) else None

    def keep(self, dim: _Dim, found: Inferred, told: list[Told]) -> None:
        """Keeps what was found; if numbers decide, unless no graph is expected or it is large."""
        if found.is_fixed:
            self.fixed[dim] = found
            return
        layouts = found.layouts.values()
        stated = {id(own.stated): own.size for own in layouts if own.stated is not None}
        self.earlier.pop(dim, None)
        if self.is_met_again and sum(stated.values()) <= _MOST_KEPT:
            self.earlier[dim] = found, told


def _steps_of(registry: EdgeRegistry) -> list[Step]:
    """The operators of a graph, each after those that take what it computes.

    They are those of all graphs of the structure. Nothing lies behind leaves.
    """
    found = []
    for node in registry.in_order():
        arguments = tuple([
            (i, edge)
            for i, edge in enumerate(registry.sources[node])
            if edge is not None and registry.names[edge[0]] != LEAF_NAME
        ])  # fmt: skip
        if arguments:
            kind = kind_of(registry.names[node])
            outputs = tuple([(i, (node, i)) for i in registry.outputs(node)])
            is_told = kind.moves is not None and None not in registry.facts[node]
            found.append(Step(node, kind, outputs, arguments, is_told))
    return found


def infer(
    registry: EdgeRegistry,
    trail: Trail,
    arrangement: Arrangement,
    generator: torch.Generator,
) -> Inferred:
    """The layout of poses of every edge to which it can be followed from the output.

    Args:
        registry: The graph.
        trail: What is known of graphs of its structure; more is afterwards.
        arrangement: The poses in the output.
        generator: The engine's own, for operators that are probed alone.
    """
    dim = arrangement.dim
    found = trail.again(dim, _Following(registry, generator))
    if found is None:
        trail.steps = trail.steps or _steps_of(registry)
        following = _Following(registry, generator)
        found = _followed(following, trail.steps, arrangement)
        trail.keep(dim, found, following.told)
    return found


def _followed(following: "_Following", steps: Sequence[Step], arrangement: Arrangement) -> Inferred:
    """Where poses lie, from operator to operator."""
    root, dim, shape = following.registry.root, arrangement.dim, arrangement.shape
    stride = 1 if dim is None else prod(shape[dim + 1 :])
    start = layout_in(shape, stride, arrangement.poses, torch.device("cpu"))
    layouts = {} if start is None else {root: start}
    lost: dict[Edge, int] = {}  # edges at which poses may mix, and the operators that may mix them
    for step in steps:
        known = {i: layout for i, edge in step.outputs if (layout := layouts.get(edge)) is not None}
        moved: _Moved = {}
        if len(known) == len(step.outputs):
            moved, follows = following.moved(step, known)
            if not follows:
                following.told.append(Told(step, known, moved))
        for argument, edge in step.arguments:
            if edge in lost:
                continue
            layout = moved.get(argument)
            if edge in layouts:
                layout = agreed(layouts.pop(edge), layout)
            if layout is None:
                before = (lost[output] for _, output in step.outputs if output in lost)
                lost[edge] = next(before, step.node)
            else:
                layouts[edge] = layout
    return Inferred(layouts, not following.told, lost, following.alone)


@final
@dataclass
class _Following:
    """Poses being followed through one graph.

    Args:
        registry: The graph.
        generator: The engine's own.
        memo: What was found for numbers.
        told: What the operators that look at numbers said.
        alone: The operators that were probed alone.
    """

    registry: EdgeRegistry
    generator: torch.Generator
    memo: Memo = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)

    def says_again(self, told: Told) -> bool:
        """Whether an operator makes of layouts what it made of them in an earlier graph."""
        moved, _ = self.moved(told.step, told.given)
        return moved.keys() == told.moved.keys() and all(
            own is before or (own is not None and before is not None and own.says_as(before))
            for own, before in zip(moved.values(), told.moved.values(), strict=True)
        )

    def moved(
        self, step: Step, layouts: Mapping[int, Layout]
    ) -> tuple[Mapping[int, Layout | None], bool]:
        """The layouts of an operator's arguments by its outputs', and if structure alone tells."""
        kind, operator = step.kind, self.registry.nodes[step.node]
        if not (kind.cuts or kind.looks_up) and (first := _single(layouts)) is not None:
            return {i: first for i, _ in step.arguments}, True
        if is_python(operator):
            return {}, True
        told = step.is_told
        if not told and is_packed(operator):
            return {}, True  # what a checkpoint would have to recompute is not read
        try:
            found = {i: self._by_rule(step, i, edge, layouts) for i, edge in step.arguments}
        except UntoldError:
            if is_packed(operator):
                return {}, True
            told, found = False, {i: (None, False) for i, _ in step.arguments}
        moved = {i: layout for i, (layout, _) in found.items()}
        follows = all(follows for _, follows in found.values())
        if told or None not in moved.values():
            return moved, told and follows
        try:
            moved = probed_alone(self.registry, step.node, layouts, self.generator)
        except RuntimeError:  # it cannot be called alone; what lies behind it is probed
            return {}, False
        self.alone.append(step.node)
        return moved, False

    def _by_rule(
        self, step: Step, argument: int, edge: Edge, layouts: Mapping[int, Layout]
    ) -> tuple[Layout | None, bool]:
        """The layout of one argument, on which all outputs must agree, and if structure tells."""
        registry, node, kind = self.registry, step.node, step.kind
        facts, inside = registry.facts[node], registry.shape(edge)
        found: list[Layout | None] = []
        follows = True
        for number, layout in layouts.items():
            out = registry.shape((node, number))
            if kind.picks is not None:
                operator = registry.nodes[node]
                found.append(kind.picks(operator, argument, layout, out, inside, self.memo))
            elif kind.moves is None or not step.is_told:
                continue
            elif kind.cuts is not None and out == inside:
                found.append(layout)  # all of it is cut out
            elif kind.cuts is not None and _is_cut(facts, layout, out, inside):
                sizes = [None if e is None else registry.shape(e) for e in registry.sources[node]]
                dim = dim_of(facts[0], max(len(out), len(inside)))
                outputs = registry.sizes[node]
                cut = Cut(registry.nodes[node], dim, argument, number, sizes, outputs)
                layout_of_all, follows = kind.cuts(cut, layout)
                found.append(layout_of_all)
            else:
                found.append(kind.moves(facts, argument, layout, out, inside))
        return (reduce(agreed, found) if found else None), follows


def _single(layouts: Mapping[int, Layout]) -> Layout | None:
    """The layout of outputs that belong to one and the same pose as a whole, if they do."""
    first = next(iter(layouts.values()))
    if not first.is_whole:
        return None
    one: Layout | None = first
    return reduce(agreed, layouts.values(), one)


def _is_cut(facts: Facts, layout: Layout, out: torch.Size, inside: torch.Size) -> bool:
    """Whether poses lie along the dimension in which tensors are put together or cut out."""
    return layout.is_whole or (len(out) >= len(inside) and layout.dim == dim_of(facts[0], len(out)))
