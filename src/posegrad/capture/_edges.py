"""The graph as the registry: nodes, edges, and where each parameter enters."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from posegrad.capture._compat import saved, shape_of
from posegrad.errors import ReentrantCheckpointError

__all__ = ["LEAF", "EdgeRegistry", "Use", "walk"]

LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
"""The class of the nodes that stand for leaves, AccumulateGrad."""

Edge = tuple[Node, int]


@dataclass(frozen=True)
class Use:
    """One place where a tensor enters the graph: argument `argument` of `node`."""

    node: Node
    argument: int


class EdgeRegistry:
    """Everything the graph of an output knows, read in one walk; nothing is kept on the model.

    Autograd's graph already records every use of every parameter, hooked or not: a layer's own, a
    parent's use of its child's weight, a tied or replaced module, a parametrization. So there is
    nothing to record in the forward, and nothing to clean up after one that was never
    differentiated.

    Args:
        output: The tensor whose graph is walked, 0.05 to 0.5 ms.

    Raises:
        ReentrantCheckpointError: if a reentrant checkpoint is in it.
    """

    def __init__(self, output: Tensor) -> None:
        root = get_gradient_edge(output)
        self.root: Edge = (root.node, root.output_nr)
        self.nodes: list[Node] = []
        self.leaves: dict[int, Node] = {}
        self._consumers: dict[Edge, list[Use]] = {}
        for node in walk(root.node):
            self.nodes.append(node)
            if type(node) is LEAF:
                self.leaves[id(node.variable)] = node  # type: ignore[attr-defined]
            for argument, edge in enumerate(node.next_functions):
                if edge[0] is not None:
                    self._consumers.setdefault((edge[0], edge[1]), []).append(Use(node, argument))
        self.number = {node: i for i, node in enumerate(self.nodes)}

    def uses(self, source: Edge) -> list[Use]:
        """The places where a tensor enters; empty if it is the output itself."""
        return self._consumers.get(source, [])

    def outputs(self, node: Node) -> list[int]:
        """The numbers of a node's outputs that something depends on."""
        count = len(shape_of(node))
        return [i for i in range(count) if (node, i) in self._consumers or (node, i) == self.root]

    def is_nested(self) -> bool:
        """Whether there are nested tensors in it, whose shapes are no numbers."""
        return any(
            not isinstance(size, int)
            for node in self.nodes
            for shape in shape_of(node)
            for size in shape
        )

    def in_order(self) -> Iterator[Node]:
        """All nodes, each after everything that was computed from it."""
        waiting = dict.fromkeys(self.nodes, 0)
        for node in self.nodes:
            for parent, _ in node.next_functions:
                if parent is not None:
                    waiting[parent] += 1
        ready = [self.root[0]]
        while ready:
            node = ready.pop()
            yield node
            for parent, _ in node.next_functions:
                if parent is not None:
                    waiting[parent] -= 1
                    if not waiting[parent]:
                        ready.append(parent)

    def below(self, node: Node) -> set[Node]:
        """The node and everything it was computed from."""
        return set(_reachable(node))

    def signature(self, numbers: Mapping[int, int]) -> int:
        """A hash of the graph's structure: kinds of nodes, edges, ranks, which parameter where.

        Args:
            numbers: A number for each parameter, by `id`.
        """
        leaves = {node: numbers.get(key, -1) for key, node in self.leaves.items()}
        return hash(
            tuple(
                (
                    node.name(),
                    leaves.get(node),
                    tuple(len(shape) for shape in shape_of(node)),
                    saved(node, "training") if "BatchNorm" in node.name() else None,
                    tuple((self.number.get(n), i) if n else None for n, i in node.next_functions),
                )
                for node in self.nodes
            )
        )


def walk(root: Node) -> Iterator[Node]:
    """All nodes from the root on, each once, in an order that only the structure decides.

    Raises:
        ReentrantCheckpointError: if a reentrant checkpoint is among them.
    """
    for node in _reachable(root):
        if node.name() == "CheckpointFunctionBackward":
            raise ReentrantCheckpointError(
                "The model uses torch.utils.checkpoint with use_reentrant=True, which works under "
                "a plain backward() only.\n"
                "Use use_reentrant=False, or schedule='retain'."
            )
        yield node


def _reachable(root: Node) -> Iterator[Node]:
    stack = [root]
    seen = {root}
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def gradient_edges(edges: Iterable[Edge]) -> list[GradientEdge]:
    """The edges as `torch.autograd.grad` takes them."""
    return [GradientEdge(node, number) for node, number in edges]
