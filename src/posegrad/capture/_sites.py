"""Where a parameter's Jacobian is read off: the uses of it, and of tensors computed from it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.autograd.graph import Node

from posegrad.capture._compat import device_of, dtype_of, shape_of
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._read import TRANSPARENT, is_readable

__all__ = ["Site", "beyond", "carries_data", "meets_itself", "sites_of"]

# Operators that only rearrange: what they make of a parameter is read in its place.
_REARRANGING = {
    "AliasBackward0",
    "CloneBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnbindBackward0",
    "UnflattenBackward0",
    "UnsafeSplitBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}

# Operators in which data meets a parameter; an argument without a graph is data.
_PRODUCTS = {
    "AddmmBackward0",
    "BmmBackward0",
    "ConvolutionBackward0",
    "MmBackward0",
}


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
    """

    parameter: str
    source: tuple[int, int]
    direct: bool
    light: bool
    node: int
    argument: int
    transposed: bool
    closed: bool


def sites_of(
    registry: EdgeRegistry, parameter: str, source: Edge, *, direct: bool, light: bool
) -> Iterator[Site]:
    """The sites of a tensor: its uses, seen through transposes, casts and rearrangements."""
    origin = (registry.number[source[0]], source[1])
    stack = [(source, False)]
    while stack:
        edge, transposed = stack.pop()
        for use in registry.uses(edge):
            kind = use.node.name()
            if kind in TRANSPARENT and _is_transparent(edge, use.node):
                turned = kind == "TBackward0" and len(shape_of(use.node)[0]) == 2
                stack.append(((use.node, 0), transposed ^ turned))
            elif kind in _REARRANGING and not is_readable(use.node, use.argument):
                for number in registry.outputs(use.node):
                    yield from sites_of(
                        registry, parameter, (use.node, number), direct=False, light=light
                    )
            else:
                number = registry.number[use.node]
                closed = is_readable(use.node, use.argument)
                yield Site(
                    parameter, origin, direct, light, number, use.argument, transposed, closed
                )


def beyond(registry: EdgeRegistry, site: Site) -> list[Site] | None:
    """The sites one operator further, where this one's cotangent mixes poses.

    What a weight normalisation, a mask or a low-rank update makes of parameters is a weight in its
    turn: its rows are read where it is used, and pulled back.

    Returns:
        None if there is nothing further: the operator's result is the output.
    """
    node = registry.nodes[site.node]
    edges = [(node, number) for number in registry.outputs(node)]
    if registry.root in edges:
        return None
    found: list[Site] = []
    for edge in edges:
        found += sites_of(registry, site.parameter, edge, direct=False, light=False)
    return found


def meets_itself(registry: EdgeRegistry, sites: list[Site]) -> bool:
    """Whether a path would be counted twice: read at one site, and pulled back through another."""
    sources = {site.source[0] for site in sites if not site.direct}
    for source in sources:
        below = registry.below(registry.nodes[source])
        if any(registry.nodes[site.node] in below for site in sites):
            return True
    return False


def carries_data(registry: EdgeRegistry, node: Node) -> bool:
    """Whether a tensor was computed from data too, and so is an activation and no weight."""
    return any(
        below.name() == "EmbeddingBackward0"
        or (below.name() in _PRODUCTS and any(edge[0] is None for edge in below.next_functions))
        for below in registry.below(node)
    )


def _is_transparent(edge: Edge, node: Node) -> bool:
    """A cast on one device between floating types; a transpose always is."""
    source = edge[0]
    dtypes = (*dtype_of(source), *dtype_of(node))
    return device_of(source) == device_of(node) and all(d.is_floating_point for d in dtypes)
