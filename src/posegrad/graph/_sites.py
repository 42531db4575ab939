"""Where a parameter's Jacobian is read off: the uses of it, and of tensors computed from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from posegrad._torch import device_of, dtype_of, memory_of, saved_tensors
from posegrad.graph._edges import Edge, EdgeRegistry
from posegrad.graph._layouts import dim_of
from posegrad.graph._moves import aligned, flipped, permuted, repeated, transposed
from posegrad.graph._operators import Kind, kind_of
from posegrad.jacobian import Layout

__all__ = [
    "Site",
    "beyond",
    "carries_data",
    "kept_shapes",
    "looks_up",
    "may_be_shared",
    "meets_itself",
    "sites_of",
]

_ALIGNED = aligned, repeated  # the rules of operators that go element by element


@final
@dataclass(frozen=True)
class Site:
    """One use at which rows are read. Nodes go by their numbers, so a site outlives its graph.

    Args:
        parameter: The parameter's name.
        source: The tensor that enters: the parameter's leaf, or an edge computed from it.
        direct: Whether it is the leaf itself, so that nothing has to be pulled back.
        light: Whether what lies between only rearranges, and so needs no saved tensor.
        looked_up: The operator that looked up rows of the parameter, if nothing but that and
            rearrangements lies between.
        node: The number of the operator that takes it.
        argument: As which argument the operator takes it.
        transposed: Whether a transpose lies between.
        closed: Whether a closed form is to be read; else the operator's own vjp is used.
        edges: The operator's outputs, whose cotangents are needed.
    """

    parameter: str
    source: Edge
    direct: bool
    light: bool
    node: int
    argument: int
    transposed: bool
    closed: bool
    edges: tuple[Edge, ...]
    looked_up: int | None = None


def sites_of(
    registry: EdgeRegistry,
    parameter: str,
    source: Edge,
    *,
    direct: bool,
    light: bool,
    looked_up: int | None = None,
) -> Iterator[Site]:
    """The sites of a tensor: its uses, seen through transposes, casts and rearrangements."""
    stack = [(source, False)]
    while stack:
        edge, is_turned = stack.pop()
        for use in registry.uses(edge):
            kind = kind_of(registry.names[use.node])
            outputs = tuple((use.node, number) for number in registry.outputs(use.node))
            closed = use.argument in kind.forms
            if kind.keeps and _keeps_shape(registry, use.node):
                stack.append(((use.node, 0), is_turned))
            elif kind.is_transparent and _is_transparent(registry, edge, use.node):
                turned = kind.moves is flipped and len(registry.sizes[use.node][0]) == 2
                stack.append(((use.node, 0), is_turned ^ turned))
            elif _is_turned(registry, use.node):
                stack.append(((use.node, 0), not is_turned))
            elif kind.rearranges and not closed:
                for output in outputs:
                    yield from sites_of(
                        registry, parameter, output, direct=False, light=light, looked_up=looked_up
                    )
            else:
                yield Site(
                    parameter, source, direct, light, use.node, use.argument, is_turned, closed,
                    outputs, looked_up,
                )  # fmt: skip


def kept_shapes(registry: EdgeRegistry) -> tuple[bool, ...]:
    """All that `sites_of` looks at in the sizes of a graph; the rest is structure."""
    nodes = enumerate(registry.names)
    return tuple([_keeps_shape(registry, node) for node, name in nodes if kind_of(name).keeps])


def beyond(registry: EdgeRegistry, site: Site) -> list[Site] | None:
    """The sites one operator further, where this one's cotangent mixes poses.

    What a weight normalisation, a mask or a low-rank update makes of parameters is a weight in its
    turn: its rows are read where it is used, and pulled back.

    Returns:
        None if there is nothing further: the operator's result is the output.
    """
    if registry.root in site.edges:
        return None
    table = site.node if looks_up(registry, site) else None
    found: list[Site] = []
    for edge in site.edges:
        found += sites_of(
            registry, site.parameter, edge, direct=False, light=False, looked_up=table
        )
    return found


def looks_up(registry: EdgeRegistry, site: Site) -> bool:
    """Whether rows of the parameter are looked up there."""
    plain = site.direct and site.closed and not site.transposed
    return plain and kind_of(registry.names[site.node]).looks_up


def meets_itself(registry: EdgeRegistry, sites: list[Site]) -> bool:
    """Whether a path would be counted twice: read at one site, and pulled back through another."""
    for source in {site.source[0] for site in sites if not site.direct}:
        below = registry.below(source)
        if any(site.node in below for site in sites):
            return True
    return False


def carries_data(
    registry: EdgeRegistry, site: Site, layouts: Mapping[Edge, Layout], own: frozenset[int]
) -> bool:
    """Whether what enters was computed from data too, and so is an activation and no weight.

    Data enters a product as an operand without a graph, and a table as the numbers of the rows to
    look up. What belongs to the modules, as buffers do, is no data. Rows that are looked up and
    then broadcast along the poses are the same for all of them: positions, distances.

    Args:
        registry: The graph.
        site: Where it enters.
        layouts: Where poses lie.
        own: The memory of the modules' parameters and buffers.
    """
    kinds = _kinds_below(registry, site)
    if _meets_data(registry, kinds, own):
        return True
    told = [node for node, kind in kinds.items() if kind.looks_up]
    if all(_has_only(registry, node, own) for node in told):
        return False
    return not (_keeps_rows(registry, kinds) and _is_shared(registry, site, layouts))


def may_be_shared(registry: EdgeRegistry, site: Site, own: frozenset[int]) -> bool:
    """Whether one has to look further on to tell data from what is broadcast along the poses.

    The arguments are those of `carries_data`.
    """
    kinds = _kinds_below(registry, site)
    goes_on = kind_of(registry.names[site.node]).moves in _ALIGNED
    return goes_on and _keeps_rows(registry, kinds) and not _meets_data(registry, kinds, own)


def _kinds_below(registry: EdgeRegistry, site: Site) -> dict[int, Kind]:
    """All operators by which what enters was computed."""
    return {node: kind_of(registry.names[node]) for node in registry.below(site.source[0])}


def _meets_data(registry: EdgeRegistry, kinds: Mapping[int, Kind], own: frozenset[int]) -> bool:
    """Whether data is multiplied with parameters."""
    return any(
        kind.multiplies and None in registry.sources[node] and not _has_only(registry, node, own)
        for node, kind in kinds.items()
    )


def _keeps_rows(registry: EdgeRegistry, kinds: Mapping[int, Kind]) -> bool:
    """Whether rows are looked up, and go element by element from then on."""
    return all(
        kind.looks_up
        or kind.rearranges
        or kind.moves in _ALIGNED
        or not any(registry.sources[node])
        for node, kind in kinds.items()
    )


def _has_only(registry: EdgeRegistry, node: int, own: frozenset[int]) -> bool:
    """Whether an operator is seen to have saved only the modules' tensors and unit matrices."""
    tensors = saved_tensors(registry.nodes[node])
    return tensors is not None and all(memory_of(t) in own or _is_unit(t) for t in tensors)


def _is_unit(tensor: Tensor) -> bool:
    """Whether it is a unit matrix, as reflections and rotations of a weight start from."""
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]:
        return False
    ones = bool((tensor.diagonal() == 1).all())
    return ones and int(torch.count_nonzero(tensor)) == len(tensor)


def _is_shared(registry: EdgeRegistry, site: Site, layouts: Mapping[Edge, Layout]) -> bool:
    """Whether what enters is the same for all poses: it is broadcast, a factor, or a table."""
    kind, layout = kind_of(registry.names[site.node]), layouts.get(site.edges[0])
    if layout is None or kind.looks_up:
        return kind.looks_up
    if kind.moves is None or not (kind.moves in _ALIGNED or kind.multiplies):
        return False
    out, inside = registry.shape(site.edges[0]), registry.shape(site.source)
    return kind.moves(registry.facts[site.node], site.argument, layout, out, inside) is None


def _keeps_shape(registry: EdgeRegistry, node: int) -> bool:
    """Whether an operator of one argument leaves the shape as it is."""
    (source,) = registry.sources[node]
    return source is not None and registry.sizes[node] == (registry.sizes[source[0]][source[1]],)


def _is_turned(registry: EdgeRegistry, node: int) -> bool:
    """Whether an operator transposes a matrix, by `transpose` or `permute`, for products alone."""
    kind, facts = kind_of(registry.names[node]), registry.facts[node]
    if len(registry.sizes[node][0]) != 2 or None in facts:
        return False
    if kind.moves is permuted:
        turns = [dim_of(dim, 2) for dim in facts[0]] == [1, 0]
    else:
        turns = kind.moves is transposed and dim_of(facts[0], 2) != dim_of(facts[1], 2)
    uses = registry.uses((node, 0))
    return turns and all(kind_of(registry.names[use.node]).multiplies for use in uses)


def _is_transparent(registry: EdgeRegistry, edge: Edge, node: int) -> bool:
    """Whether it stays on one device and among floating types: not every cast does."""
    before, after = registry.nodes[edge[0]], registry.nodes[node]
    dtypes = (*dtype_of(before), *dtype_of(after))
    return device_of(before) == device_of(after) and all(d.is_floating_point for d in dtypes)
