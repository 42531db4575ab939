"""Does a prediction depend only on tensors whose gradients the engine will deliver?

Between the leaves the engine knows (parameters, pose tensors) and a prediction there may be nothing
else that requires grad. A tensor that slipped in through a closure or a cache would lose its
gradient without a word, so the graph of a prediction is walked before it is differentiated. The
walk costs 0.05 to 0.5 ms; nothing is kept.
"""

import sys
from collections.abc import Collection
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from posegrad._restoring import Change
from posegrad._torch import made_at, multithreading, set_multithreading
from posegrad.errors import UntrackedTensorError
from posegrad.graph._cuts import parted, unbound
from posegrad.graph._dtypes import carries_float16
from posegrad.graph._edges import LEAF, walk
from posegrad.graph._operators import kind_of

__all__ = ["Tracked", "check_tracked", "graph_clock", "is_slice_of_leaf", "leaf_of_slice"]


@final
class Tracked(NamedTuple):
    """What a walk through the graph of a prediction came across.

    Args:
        float16: Whether gradients pass through float16.
        leaves: `id` of every leaf.
    """

    float16: bool
    leaves: set[int]


@final
class graph_clock(Change):  # noqa: N801
    """A time stamp: the graph nodes that are made inside carry a number at least as high.

    Each thread counts for itself, and an accelerator's backward runs on a thread of its own. So
    what a model differentiates inside its forward (forces) is differentiated on this thread.
    """

    def __init__(self) -> None:
        self._start = self.now()
        self._before = multithreading()

    @staticmethod
    def now() -> int:
        """The time stamp of this moment."""
        with torch.enable_grad():
            node = torch.zeros((), requires_grad=True, device="cpu").view(()).grad_fn
        assert node is not None
        return made_at(node)

    def make(self) -> int:
        set_multithreading(False)
        return self._start

    def undo(self) -> None:
        set_multithreading(self._before)


def check_tracked(output: Tensor, known: Collection[int], since: int) -> Tracked:
    """Walks the graph of `output` and refuses what the engine would not give a gradient.

    Args:
        output: Predictions with their graph.
        known: `id` of every leaf that is allowed to appear.
        since: The stamp of the `graph_clock()` around the forward; older nodes were made elsewhere.

    Raises:
        UntrackedTensorError: if another leaf, or a node older than the forward, is reached.
        ReentrantCheckpointError: if a reentrant checkpoint is reached.
    """
    narrow, leaves = False, set()
    for node in walk(get_gradient_edge(output).node):
        if type(node) is LEAF:
            if id(_variable(node)) not in known and _references(node) > _HELD_BY_GRAPH_ALONE:
                raise UntrackedTensorError(_leaf_message(_variable(node)))
            leaves.add(id(_variable(node)))
        elif made_at(node) < since and not _is_cached_cast(node):
            raise UntrackedTensorError(_older_message(node))
        else:
            narrow = narrow or carries_float16(node)
    return Tracked(narrow, leaves)


def is_slice_of_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is a row or a slice of a stacked leaf."""
    return leaf_of_slice(tensor) is not None


def leaf_of_slice(tensor: Tensor) -> Tensor | None:
    """The stacked leaf that a tensor is a row or a slice of; None if it is neither."""
    node = tensor.grad_fn
    if node is None or kind_of(node.name()).cuts not in (unbound, parted):
        return None
    stacked = node.next_functions[0][0]
    return _variable(stacked) if type(stacked) is LEAF else None


def _is_cached_cast(node: Node) -> bool:
    """Autocast casts a parameter once and reuses the copy in later forwards."""
    return kind_of(node.name()).casts and all(
        type(parent) is LEAF for parent, _ in node.next_functions
    )


def _variable(leaf: Node) -> Tensor:
    variable: Tensor = leaf.variable  # type: ignore[attr-defined]
    return variable


def _references(leaf: Node) -> int:
    variable = _variable(leaf)
    return sys.getrefcount(variable)


def _references_of_a_dropped_leaf() -> int:
    node = torch.zeros((), requires_grad=True, device="cpu").view(()).grad_fn
    leaf = node.next_functions[0][0] if node is not None else None
    assert leaf is not None
    return _references(leaf)


# A leaf that only the graph holds was made inside the forward, by a model that differentiates by
# its own copy of the coordinates: nobody could read its gradient, so nothing is lost.
_HELD_BY_GRAPH_ALONE = _references_of_a_dropped_leaf()


def _leaf_message(variable: Tensor) -> str:
    return (
        f"A tensor of shape {list(variable.shape)} that requires grad enters the prediction, but "
        f"it is neither a parameter of the engine's modules nor part of a pose.\n"
        f"Its gradient would be lost, because each pose's graph is freed before the loss exists.\n"
        f"Give its module to the engine, Engine(model, other, predict=...), put the tensor into "
        f"the pose, or detach it."
    )


def _older_message(node: Node) -> str:
    return (
        f"The prediction depends on a result that was computed before this pose was scored "
        f"(by {node.name()}), through a closure or a cache.\n"
        f"Each pose's graph is freed on its own, so a part shared between poses would be freed "
        f"with the first one.\n"
        f"Put the shared tensor into the pose (its gradient then flows on), compute it inside "
        f"predict, detach it, or use schedule='retain'."
    )
