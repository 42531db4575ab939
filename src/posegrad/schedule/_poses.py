"""Poses of any kind: a list of them from whatever the user has, and the tensors inside one."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

__all__ = ["Pose", "each_pose", "in_chunks", "map_tensors", "tensors_of"]

Pose = Any
"""What the model is called with: a tensor, a container of tensors, a PyG Data, anything."""


def each_pose(poses: Iterable[Pose] | Tensor) -> Iterator[Pose]:
    """The poses one by one; a stacked tensor gives its rows (one graph node for all of them)."""
    return iter(poses.unbind(0)) if isinstance(poses, Tensor) else iter(poses)


def in_chunks(poses: Iterator[Pose], size: int) -> Iterator[list[Pose]]:
    """Lists of `size` poses, the last one shorter."""
    while chunk := list(islice(poses, size)):
        yield chunk


def tensors_of(pose: Pose) -> list[Tensor]:
    """Every tensor `map_tensors` finds in a pose."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, pose)
    return found


def map_tensors(function: Callable[[Tensor], Tensor], pose: Pose) -> Pose:
    """Returns `pose` with `function` applied to every tensor in it.

    Looks into tuples, named tuples, lists, mappings, dataclasses and PyG Data; each is copied only
    if one of its tensors changes. Other objects are handed through as they are.
    """
    if isinstance(pose, Tensor):
        return function(pose)
    items = _items_of(pose)
    if items is None:
        return pose
    mapped = {key: map_tensors(function, value) for key, value in items.items()}
    if all(mapped[key] is value for key, value in items.items()):
        return pose
    return _rebuilt(pose, mapped)


def _items_of(pose: Pose) -> dict[Any, Any] | None:
    if isinstance(pose, tuple | list):
        return dict(enumerate(pose))
    if isinstance(pose, Mapping):
        return dict(pose)
    if dataclasses.is_dataclass(pose) and not isinstance(pose, type):
        return {field.name: getattr(pose, field.name) for field in dataclasses.fields(pose)}
    if hasattr(pose, "stores"):  # PyG Data, HeteroData, Batch: a list of mappings
        return {
            (i, key): value for i, store in enumerate(pose.stores) for key, value in store.items()
        }
    return None


def _rebuilt(pose: Pose, items: dict[Any, Any]) -> Pose:
    if isinstance(pose, tuple) and hasattr(pose, "_fields"):
        return type(pose)(*items.values())
    if isinstance(pose, tuple | list):
        return type(pose)(items.values())
    new = copy.copy(pose)
    if isinstance(pose, Mapping):
        new.update(items)
    elif dataclasses.is_dataclass(pose):
        for name, value in items.items():
            object.__setattr__(new, name, value)  # frozen dataclasses too
    else:
        for (i, key), value in items.items():
            new.stores[i][key] = value
    return new
