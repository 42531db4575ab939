"""Freeing a graph without running it."""

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor

from posegrad.capture._compat import saved_slots
from posegrad.capture._edges import EdgeRegistry

__all__ = ["release"]


def release(registry: EdgeRegistry, above: Iterable[int]) -> None:
    """Frees what the nodes above some leaves saved, as `torch.autograd.grad` of them would.

    Nothing runs, no hook of the user's either: every saved tensor is replaced by nothing, through
    the interface that lets saved tensors be packed. Using the graph again raises, as it would after
    a backward.

    Args:
        registry: The graph.
        above: The numbers of those nodes.
    """
    for number in above:
        for slot in saved_slots(registry.nodes[number]):
            try:
                slot.register_hooks(_nothing, _gone)
            except RuntimeError:
                continue  # empty, or packed by a checkpoint, which holds little


def _nothing(_: Tensor) -> None:
    return None


def _gone(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: the engine has read its Jacobian and "
        "freed it. Pass jacobian(..., retain_graph=True) to keep it."
    )
