r"""Owners of rows by construction: following the dimension of poses through the graph.

Probing finds the owners of any row and costs a backward. Most graphs need no probe: if the output
`[m]` is a sum over T of `[m, T]`, and that a product of `[m, T, d]` with a weight, the dimension of
poses can be followed from operator to operator by what each operator *is*, whatever numbers flow.
Where an operator is not known to keep poses apart, nothing is inferred for what lies behind it, and
it is probed.

A tensor's numbers, in row-major order, are laid out as :math:`a \times m \times b`: number n
belongs to pose :math:`\lfloor n / b \rfloor \bmod m`. Views keep b, the *stride*; other operators
move it with their dimensions (`_axis.py`).
"""

from math import prod

import torch

from posegrad.capture._axis import RULES, Axis, Facts, Rule, axis_in
from posegrad.capture._compat import is_python
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.jacobian import Arrangement

__all__ = ["infer"]


def infer(registry: EdgeRegistry, arrangement: Arrangement) -> dict[Edge, Axis]:
    """The axis of poses of every edge for which it follows from the graph alone.

    Args:
        registry: The graph. Its structure and shapes decide; no number does.
        arrangement: The poses in the output.
    """
    dim, shape = arrangement.dim, arrangement.shape
    stride = 1 if dim is None else prod(shape[dim + 1 :])
    found: dict[Edge, Axis | None] = {registry.root: axis_in(shape, stride, arrangement.poses)}
    for node in registry.in_order():
        if not registry.sources[node]:
            continue
        rule = None if is_python(registry.nodes[node]) else RULES.get(registry.names[node])
        facts, shapes = registry.facts[node], registry.shapes[node]
        numbers = registry.outputs(node)
        for argument, edge in enumerate(registry.sources[node]):
            if edge is None:
                continue
            inside = registry.shapes[edge[0]][edge[1]]
            axes = {
                _moved(rule, facts, argument, found.get((node, i)), shapes[i], inside)
                for i in numbers
            }
            axis = axes.pop() if len(axes) == 1 else None
            found[edge] = axis if found.get(edge, axis) == axis else None
    return {edge: axis for edge, axis in found.items() if axis is not None}


def _moved(
    rule: Rule | None,
    facts: Facts,
    argument: int,
    axis: Axis | None,
    out: torch.Size,
    inside: torch.Size,
) -> Axis | None:
    return None if rule is None or axis is None else rule(facts, argument, axis, out, inside)
