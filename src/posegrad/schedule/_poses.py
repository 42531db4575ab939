"""Poses of any kind, and the tensors inside them."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

__all__ = [
    "Pose",
    "bytes_of",
    "copied",
    "is_graph",
    "items_of",
    "map_tensors",
    "shapes_of",
    "tensors_of",
]

Pose = Any
"""What the model is called with: a tensor, a container of tensors, a PyG Data, anything."""


def tensors_of(pose: Pose) -> list[Tensor]:
    """Every tensor `map_tensors` finds in a pose."""
    if isinstance(pose, Tensor):
        return [pose]
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, pose)
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The size of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def shapes_of(pose: Pose) -> list[tuple[int, ...]]:
    """The shape of every tensor in a pose; for a nested tensor, its number of elements."""
    return [(t.numel(),) if t.is_nested else tuple(t.shape) for t in tensors_of(pose)]


def copied(pose: Pose) -> Pose:
    """A copy of the pose's containers, but not of its tensors."""
    return map_tensors(lambda tensor: tensor, pose)


def map_tensors(function: Callable[[Tensor], Tensor], pose: Pose) -> Pose:
    """Returns `pose` with `function` applied to every tensor in it.

    Looks into tuples, named tuples, lists, mappings, dataclasses and PyG Data. Mutable containers
    are always copied, others only if a tensor in them changes. Other objects are passed on as they
    are.
    """
    if isinstance(pose, Tensor):
        return function(pose)
    items = items_of(pose)
    if items is None:
        return pose
    mapped = {key: map_tensors(function, value) for key, value in items.items()}
    changed = {key: mapped[key] for key, value in items.items() if mapped[key] is not value}
    if isinstance(pose, tuple):
        return _tuple_like(pose, mapped) if changed else pose
    if changed or isinstance(pose, list | MutableMapping) or is_graph(pose):
        return _rebuilt(pose, changed)
    return copy.copy(pose) if dataclasses.is_dataclass(pose) else pose


def items_of(pose: Pose) -> dict[Any, Any] | None:
    """The contents of a container that is looked into, by key; None if it is none."""
    if isinstance(pose, tuple | list):
        return dict(enumerate(pose))
    if isinstance(pose, Mapping):
        return dict(pose)
    if dataclasses.is_dataclass(pose) and not isinstance(pose, type):
        names = [field.name for field in dataclasses.fields(pose)]
        return {name: getattr(pose, name) for name in names if hasattr(pose, name)}
    if is_graph(pose):
        stores = enumerate(pose.stores)
        return {(i, key): value for i, store in stores for key, value in store.items()}
    return None


def is_graph(pose: Pose) -> bool:
    """Whether it is a PyG Data, HeteroData or Batch, which keep their tensors in `stores`."""
    stores = getattr(pose, "stores", None)
    return isinstance(stores, list) and all(isinstance(store, Mapping) for store in stores)


def _tuple_like(pose: tuple[Any, ...], items: dict[Any, Any]) -> tuple[Any, ...]:
    return type(pose)(*items.values()) if hasattr(pose, "_fields") else type(pose)(items.values())


def _rebuilt(pose: Pose, changed: dict[Any, Any]) -> Pose:
    """A copy of a container, with the changed items in it."""
    new: Any = dict(pose) if isinstance(pose, MappingProxyType) else copy.copy(pose)
    for key, value in changed.items():
        if isinstance(pose, list | Mapping):
            new[key] = value
        elif dataclasses.is_dataclass(pose):
            object.__setattr__(new, key, value)  # frozen dataclasses too
        else:
            i, name = key
            new.stores[i][name] = value
    return new
