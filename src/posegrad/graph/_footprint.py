"""What a graph keeps for its backward."""

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from posegrad._torch import address_of, held_by, tells_slots
from posegrad.errors import ReentrantCheckpointError
from posegrad.graph._edges import walk

__all__ = ["footprint", "storages"]

_NOWHERE = 0  # stands for the storage of a tensor that has none, and is counted each time


def footprint(output: Tensor, other: Collection[int]) -> tuple[int, int] | None:
    """The bytes that the graph of a tensor keeps, and how many operators are in it.

    Memory that several tensors share counts once. The walk takes some 5 us for each node; nothing
    is kept.

    Args:
        output: The tensor.
        other: The storages that are there anyway: those of parameters, buffers and inputs.

    Returns:
        None if torch does not tell, or a reentrant checkpoint hides what it keeps.
    """
    if not tells_slots():
        return None
    try:
        return _counted(output, other)
    except ReentrantCheckpointError:
        return None


def _counted(output: Tensor, other: Collection[int]) -> tuple[int, int]:
    nodes, total, seen = 0, 0, set(other)
    for node in walk(get_gradient_edge(output).node):
        nodes += 1
        for tensor in held_by(node):
            storage, size = _memory(tensor)
            if storage not in seen:
                total += size
                seen.add(storage)
                seen.discard(_NOWHERE)
    return total, nodes


def storages(tensors: Collection[Tensor]) -> set[int]:
    """The storages of tensors, as `footprint` takes them."""
    return {_memory(tensor)[0] for tensor in tensors} - {_NOWHERE}


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor is in, and the bytes of it."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, or of no real memory
        return _NOWHERE, tensor.numel() * tensor.element_size()
    return address_of(storage), storage.nbytes()
