r"""Owners of rows by construction: following the dimension of poses through the graph.

Probing finds the owners of any row and costs a backward. Most graphs need no probe: if the output
`[m]` is a sum over T of `[m, T]`, and that a product of `[m, T, d]` with a weight, the dimension of
poses can be followed from operator to operator by what each operator *is*, whatever numbers flow.
Where an operator is not known to keep poses apart, nothing is inferred for what lies behind it, and
it is probed.

Rows may also be picked by number, as messages between atoms are; then owners follow the numbers
(`_indexed.py`), and are found anew for each graph.

A tensor's numbers, in row-major order, are laid out as :math:`a \times m \times b`: number n
belongs to pose :math:`\lfloor n / b \rfloor \bmod m`. Views keep b, the *stride*; other operators
move it with their dimensions (`_axis.py`).
"""

from math import prod

from posegrad._compat import is_packed, is_python
from posegrad.capture._axis import Axis, agreed, axis_in
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._operators import kind_of
from posegrad.jacobian import Arrangement

__all__ = ["follows_numbers", "infer"]


def infer(registry: EdgeRegistry, arrangement: Arrangement) -> dict[Edge, Axis]:
    """The axis of poses of every edge for which it follows from the graph alone.

    Args:
        registry: The graph.
        arrangement: The poses in the output.
    """
    dim, shape = arrangement.dim, arrangement.shape
    stride = 1 if dim is None else prod(shape[dim + 1 :])
    found: dict[Edge, Axis | None] = {registry.root: axis_in(shape, stride, arrangement.poses)}
    for node in registry.in_order():
        numbers = registry.outputs(node)
        for argument, edge in enumerate(registry.sources[node]):
            if edge is None:
                continue
            moved = [_moved(registry, node, i, argument, edge, found) for i in numbers]
            axis = moved[0]
            for other in [*moved[1:], *([found[edge]] if edge in found else [])]:
                axis = agreed(axis, other)
            found[edge] = axis
    return {edge: axis for edge, axis in found.items() if axis is not None}


def follows_numbers(registry: EdgeRegistry) -> bool:
    """Whether `infer` may look at numbers, so that it holds for this one graph only."""
    return any(kind_of(name).picks is not None for name in registry.names)


def _moved(
    registry: EdgeRegistry,
    node: int,
    number: int,
    argument: int,
    edge: Edge,
    found: dict[Edge, Axis | None],
) -> Axis | None:
    """The axis of an operator's argument, as its output of that number tells."""
    axis, operator = found.get((node, number)), registry.nodes[node]
    if axis is None or is_python(operator):
        return None
    kind, facts = kind_of(registry.names[node]), registry.facts[node]
    out, inside = registry.shape((node, number)), registry.shape(edge)
    if kind.picks is not None:  # what a checkpoint would have to recompute is not read
        return None if is_packed(operator) else kind.picks(operator, argument, axis, out, inside)
    if kind.moves is None or None in facts:  # another release may save no such fact
        return None
    return kind.moves(facts, argument, axis, out, inside)
