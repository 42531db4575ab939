"""Freeing a graph without running it."""

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor

from posegrad._torch import slot_names, slots_of
from posegrad.graph._edges import EdgeRegistry

__all__ = ["Slot", "release", "slots_above"]

Slot = tuple[int, str]
"""The number of a node, and the name of what it saved."""


def release(registry: EdgeRegistry, slots: Iterable[Slot]) -> None:
    """Frees what nodes saved, as `torch.autograd.grad` of the leaves below would.

    Nothing runs, no hook of the user's either: every saved tensor is replaced by nothing, through
    the interface that lets saved tensors be packed. Using the graph again raises, as it would after
    a backward.

    Args:
        registry: The graph.
        slots: Where tensors may be saved.
    """
    for number, name in slots:
        for slot in slots_of(registry.nodes[number], name):
            try:
                slot.register_hooks(_nothing, _gone)
            except RuntimeError:
                continue  # empty, or packed by a checkpoint, which holds little


def slots_above(registry: EdgeRegistry, leaves: Iterable[int]) -> list[Slot]:
    """Where everything that was computed from some leaves saved something."""
    return [
        (number, name)
        for number in registry.above(leaves)
        for name in slot_names(registry.nodes[number])
        if any(slot.data is not None for slot in slots_of(registry.nodes[number], name))
    ]


def _nothing(_: Tensor) -> None:
    return None


def _gone(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: the engine has read its Jacobian and "
        "freed it. Pass jacobian(..., retain_graph=True) to keep it."
    )
