"""Freeing a graph without running it."""

from collections.abc import Callable, Iterable
from typing import NoReturn, final

from torch import Tensor

from posegrad._torch import after_backward, slot_names, slots_of
from posegrad.graph._edges import EdgeRegistry

__all__ = ["KeptGraph", "Slot", "release", "slots_above"]

Slot = tuple[int, str]
"""The number of a node, and the name of what it saved."""


@final
class KeptGraph:
    """A graph that was read, and through which other losses may still be differentiated.

    Args:
        registry: The graph; None if there is none.
    """

    def __init__(self, registry: EdgeRegistry | None) -> None:
        self._registry = registry

    def free_after_backward(self) -> None:
        """Frees it when the backward that is running ends, as that backward does with its own."""
        after_backward(self._free)

    def _free(self) -> None:
        registry, self._registry = self._registry, None
        if registry is not None:
            nodes = enumerate(registry.nodes)
            slots = [(number, name) for number, node in nodes for name in slot_names(node)]
            release(registry, slots, _freed_by_backward)


def release(
    registry: EdgeRegistry, slots: Iterable[Slot], gone: Callable[[None], NoReturn] | None = None
) -> None:
    """Frees what nodes saved, as `torch.autograd.grad` of the leaves below would.

    Nothing runs, no hook of the user's either: every saved tensor is replaced by nothing, through
    the interface that lets saved tensors be packed. Using the graph again raises, as it would after
    a backward.

    Args:
        registry: The graph.
        slots: Where tensors may be saved.
        gone: Raises the error for whoever uses the graph again.
    """
    for number, name in slots:
        for slot in slots_of(registry.nodes[number], name):
            try:
                slot.register_hooks(_nothing, gone or _read)
            except RuntimeError:
                continue  # empty, or packed by a checkpoint, which holds little


def slots_above(registry: EdgeRegistry, leaves: Iterable[int]) -> list[Slot]:
    """The slots in which the nodes that were computed from some leaves hold something."""
    return [
        (number, name)
        for number in registry.above(leaves)
        for name in slot_names(registry.nodes[number])
        if any(slot.data is not None for slot in slots_of(registry.nodes[number], name))
    ]


def _nothing(_: Tensor) -> None:
    return None


def _freed_by_backward(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: the backward of engine.loss() has "
        "freed it, as any backward does. Add the losses up before it, or call "
        "backward(retain_graph=True)."
    )


def _read(_: None) -> NoReturn:
    raise RuntimeError(
        "Trying to backward through the graph a second time: the engine has read its Jacobian and "
        "freed it. Pass jacobian(..., retain_graph=True) to keep it."
    )
