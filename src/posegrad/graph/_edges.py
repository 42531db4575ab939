"""The graph as the registry: nodes, edges, and where each parameter enters.

At its edges a backward of ours asks for cotangents, or hooks hear them in a backward that somebody
else runs.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from posegrad._torch import facts_of, is_python, outputs_of
from posegrad.errors import ReentrantCheckpointError
from posegrad.graph._dtypes import carries_float16, dtypes_passed
from posegrad.graph._layouts import Facts
from posegrad.graph._operators import kind_of

__all__ = ["LEAF", "LEAF_NAME", "Argument", "Edge", "EdgeRegistry", "named", "walk"]

LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True, device="cpu")).node)
"""The class of the nodes that stand for leaves."""

LEAF_NAME = "AccumulateGrad"

Edge = tuple[int, int]
"""A tensor of the graph: the number of the node that computed it, and which of its outputs."""

Sizes = tuple[tuple[Any, ...], ...]
Dtypes = tuple[torch.dtype, ...]


@final
@dataclass(frozen=True)
class Argument:
    """One place where a tensor enters the graph: argument `argument` of node number `node`."""

    node: int
    argument: int


@final
class EdgeRegistry:
    """Everything the graph of an output knows, read in one walk; nothing is kept on the model.

    Autograd's graph already records every use of every parameter, hooked or not: a layer's own, a
    parent's use of its child's weight, a tied or replaced module, a parametrization. So there is
    nothing to record in the forward, and nothing to clean up after one that was never
    differentiated.

    Nodes go by number, in an order that only the structure decides: what is found out about one
    graph holds for the next of the same structure.

    Args:
        output: The tensor whose graph is walked. The walk takes about 2 us for each node and is
            most of what a Jacobian costs beyond its arithmetic, so no node is asked for the same
            thing twice.

    Raises:
        ReentrantCheckpointError: if a reentrant checkpoint is in it.
    """

    def __init__(self, output: Tensor) -> None:
        root = output.grad_fn
        if root is None:
            root = get_gradient_edge(output).node  # the output is a parameter itself
        self.root: Edge = (0, output.output_nr)
        self.nodes, self.sources = _reachable(root)
        self.names = [_NAMES.get(type(node)) or _name(node) for node in self.nodes]
        self.sizes: list[Sizes] = []  # `shape` makes a `torch.Size` of them
        self.dtypes: list[Dtypes] = []
        self.facts: list[Facts] = []
        self.leaves: dict[int, int] = {}
        for number, (node, name) in enumerate(zip(self.nodes, self.names, strict=True)):
            sizes: Sizes
            dtypes: Dtypes
            if name == LEAF_NAME:
                leaf: Tensor = node.variable  # type: ignore[attr-defined]
                self.leaves[id(leaf)] = number
                sizes, dtypes = (leaf.shape,), (leaf.dtype,)
            else:
                sizes, dtypes = outputs_of(node)
            self.sizes.append(sizes)
            self.dtypes.append(dtypes)
            told = kind_of(name).told
            self.facts.append(facts_of(node, told) if told else ())

    @cached_property
    def _consumers(self) -> dict[Edge, list[Argument]]:
        found: dict[Edge, list[Argument]] = {}
        for number, sources in enumerate(self.sources):
            for argument, edge in enumerate(sources):
                if edge is not None:
                    found.setdefault(edge, []).append(Argument(number, argument))
        return found

    def shape(self, edge: Edge) -> torch.Size:
        """The shape of a tensor of the graph."""
        return torch.Size(self.sizes[edge[0]][edge[1]])

    def uses(self, source: Edge) -> list[Argument]:
        """The places where a tensor enters; empty if it is the output itself."""
        return self._consumers.get(source, [])

    def used(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some parameters that the output depends on; empty ones have no row."""
        leaves = self.leaves
        return {name: p for name, p in parameters.items() if id(p) in leaves and p.numel()}

    def outputs(self, node: int) -> list[int]:
        """The numbers of a node's outputs that something depends on."""
        edges = [(node, i) for i in range(len(self.sizes[node]))]
        return [edge[1] for edge in edges if edge in self._consumers or edge == self.root]

    @cached_property
    def is_nested(self) -> bool:
        """Whether shapes in it are no numbers: of nested tensors, or where torch tells none."""
        return any(
            not isinstance(size, int) for sizes in self.sizes for shape in sizes for size in shape
        )

    def has_python(self) -> bool:
        """Whether functions written in Python are in it."""
        return any(is_python(node) for node in self.nodes if type(node) not in _NAMES)

    def has_float16(self) -> bool:
        """Whether gradients pass through float16 on the way."""
        if torch.float16 in chain.from_iterable(self.dtypes):
            return True
        unnamed = [node for node in self.nodes if type(node) not in _NAMES]
        return any(carries_float16(node) for node in unnamed if is_python(node))

    def in_order(self) -> Iterator[int]:
        """All nodes, each after everything that was computed from it."""
        waiting = [0] * len(self.nodes)
        for sources in self.sources:
            for edge in sources:
                if edge is not None:
                    waiting[edge[0]] += 1
        ready = [0]
        while ready:
            number = ready.pop()
            yield number
            for edge in self.sources[number]:
                if edge is not None:
                    waiting[edge[0]] -= 1
                    if not waiting[edge[0]]:
                        ready.append(edge[0])

    def below(self, node: int) -> set[int]:
        """The node and everything it was computed from."""
        found, pending = {node}, [node]
        while pending:
            parents = {edge[0] for edge in self.sources[pending.pop()] if edge is not None}
            pending += parents - found
            found |= parents
        return found

    def above(self, leaves: Iterable[int]) -> list[int]:
        """Everything that was computed from some leaves, the output first."""
        found = set(leaves)
        rising = []
        for number in reversed(list(self.in_order())):
            if any(edge is not None and edge[0] in found for edge in self.sources[number]):
                found.add(number)
                rising.append(number)
        return rising[::-1]

    @cached_property
    def dtypes_passed(self) -> list[set[torch.dtype]]:
        """For each node the dtypes of gradients on their way to it; complex64 counts as float32."""
        passed: list[set[torch.dtype]] = [set() for _ in self.nodes]
        for number in self.in_order():
            node = self.nodes[number]
            own = dtypes_passed(node) if is_python(node) else {*self.dtypes[number]}
            passed[number] |= {d.to_real() for d in own if d.is_floating_point or d.is_complex}
            for edge in self.sources[number]:
                if edge is not None:
                    passed[edge[0]] |= passed[number]
        return passed

    def structure(self, numbers: Mapping[int, int]) -> tuple[Any, ...]:
        """Names, edges, facts and dtypes of nodes, which leaf is which parameter, which output.

        Hashable. Sizes are not in it.

        Args:
            numbers: A number for each parameter, by `id`.
        """
        leaves = tuple([(node, numbers.get(key, -1)) for key, node in self.leaves.items()])
        kinds = tuple(self.names), tuple(self.sources), tuple(self.facts), tuple(self.dtypes)
        return self.root, leaves, *kinds

    def at(self, edges: Iterable[Edge]) -> list[GradientEdge]:
        """The edges as `torch.autograd.grad` takes them."""
        return [GradientEdge(self.nodes[node], number) for node, number in edges]


def named(kind: str) -> str:
    """An operator by the name of its node: `Addmm` of `AddmmBackward0`."""
    return re.sub(r"Backward\d*$", "", kind)


def walk(root: Node) -> Iterator[Node]:
    """All nodes from the root on, each once.

    Raises:
        ReentrantCheckpointError: if a reentrant checkpoint is among them.
    """
    nodes, found = [root], {root}  # as in `_reachable`, without edges: a fifth of the time
    for node in nodes:  # grows on the way
        if type(node) not in _NAMES:
            _name(node)
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in found:
                found.add(parent)
                nodes.append(parent)


def _reachable(root: Node) -> tuple[list[Node], list[tuple[Edge | None, ...]]]:
    """All nodes, and the edges that each was computed from, with nodes numbered in this order."""
    nodes, places = [root], {root: 0}
    found: list[tuple[Edge | None, ...]] = []
    for node in nodes:  # grows on the way
        sources: list[Edge | None] = []
        for parent, number in node.next_functions:
            if parent is None:
                sources.append(None)
                continue
            place = places.setdefault(parent, len(nodes))
            if place == len(nodes):
                nodes.append(parent)
            sources.append((place, number))
        found.append(tuple(sources))
    return nodes, found


_NAMES: dict[type, str] = {LEAF: LEAF_NAME}  # of the kinds of node that always have the same name


def _name(node: Node) -> str:
    kind = type(node)
    if kind in _NAMES:
        return _NAMES[kind]
    name = node.name()
    if name == "CheckpointFunctionBackward":
        raise ReentrantCheckpointError(
            "The model uses torch.utils.checkpoint with use_reentrant=True, which works under a "
            "plain backward() only.\n"
            "Use use_reentrant=False, or schedule='retain'."
        )
    if name == kind.__name__ and not is_python(node):
        _NAMES[kind] = name
    return name
