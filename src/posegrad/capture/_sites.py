"""Where a parameter's Jacobian is read off: the uses of it, and of tensors computed from it."""

from collections.abc import Iterator
from dataclasses import dataclass

from posegrad._compat import device_of, dtype_of
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._operators import kind_of

__all__ = ["Site", "beyond", "carries_data", "kept_shapes", "meets_itself", "sites_of"]


@dataclass(frozen=True)
class Site:
    """One use at which rows are read. Nodes go by their numbers, so a site outlives its graph.

    Args:
        parameter: The parameter's name.
        source: The tensor that enters: the parameter's leaf, or an edge computed from it.
        direct: Whether it is the leaf itself, so that nothing has to be pulled back.
        light: Whether what lies between only rearranges, and so needs no saved tensor.
        node: The number of the operator that takes it, and `argument`, as which argument.
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


def sites_of(
    registry: EdgeRegistry, parameter: str, source: Edge, *, direct: bool, light: bool
) -> Iterator[Site]:
    """The sites of a tensor: its uses, seen through transposes, casts and rearrangements."""
    stack = [(source, False)]
    while stack:
        edge, transposed = stack.pop()
        for use in registry.uses(edge):
            name = registry.names[use.node]
            kind = kind_of(name)
            outputs = tuple((use.node, number) for number in registry.outputs(use.node))
            closed = use.argument in kind.forms
            if kind.keeps and _keeps_shape(registry, use.node):
                stack.append(((use.node, 0), transposed))
            elif kind.is_transparent and _is_transparent(registry, edge, use.node):
                turned = name == "TBackward0" and len(registry.sizes[use.node][0]) == 2
                stack.append(((use.node, 0), transposed ^ turned))
            elif kind.rearranges and not closed:
                for output in outputs:
                    yield from sites_of(registry, parameter, output, direct=False, light=light)
            else:
                yield Site(
                    parameter, source, direct, light, use.node, use.argument, transposed, closed,
                    outputs,
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
    found: list[Site] = []
    for edge in site.edges:
        found += sites_of(registry, site.parameter, edge, direct=False, light=False)
    return found


def meets_itself(registry: EdgeRegistry, sites: list[Site]) -> bool:
    """Whether a path would be counted twice: read at one site, and pulled back through another."""
    for source in {site.source[0] for site in sites if not site.direct}:
        below = registry.below(source)
        if any(site.node in below for site in sites):
            return True
    return False


def carries_data(registry: EdgeRegistry, node: int) -> bool:
    """Whether a tensor was computed from data too, and so is an activation and no weight."""
    return any(
        registry.names[below] == "EmbeddingBackward0"
        or (kind_of(registry.names[below]).multiplies and None in registry.sources[below])
        for below in registry.below(node)
    )


def _keeps_shape(registry: EdgeRegistry, node: int) -> bool:
    """Whether an operator of one argument leaves the shape as it is."""
    (source,) = registry.sources[node]
    return source is not None and registry.sizes[node] == (registry.shape(source),)


def _is_transparent(registry: EdgeRegistry, edge: Edge, node: int) -> bool:
    """A cast on one device between floating types; a transpose always is."""
    before, after = registry.nodes[edge[0]], registry.nodes[node]
    dtypes = (*dtype_of(before), *dtype_of(after))
    return device_of(before) == device_of(after) and all(d.is_floating_point for d in dtypes)
