"""A batch: one object that holds the poses of a group along dimension 0, and how it is sliced."""

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import accumulate, pairwise
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posegrad.errors import PosesError, ShapeMismatchError, listed
from posegrad.schedule._poses import Pose, bytes_of, is_graph, items_of, map_tensors, tensors_of

__all__ = ["Batch", "as_batch", "joined_by_pyg"]

_SLICED = (torch.strided, torch.jagged)  # layouts that can be sliced; sparse tensors are walked


class Batch(ABC):
    """Poses that come as one object.

    Args:
        poses: The object.
        count: m, the number of poses in it.
    """

    def __init__(self, poses: Any, count: int) -> None:
        self.poses = poses
        self.count = count

    @abstractmethod
    def parts(self, sizes: Sequence[int]) -> Iterator[Pose]:
        """Consecutive slices of two or more sizes, which add up to all poses."""

    @abstractmethod
    def picked(self, numbers: Sequence[int]) -> Pose:
        """A copy of some of the poses, as a batch."""

    @abstractmethod
    def followed_by(self, others: Sequence[Pose]) -> Pose:
        """A copy of its poses and those of other batches of the same kind, as one batch."""

    @abstractmethod
    def pose(self, number: int) -> Pose:
        """One pose by itself, without the dimension of poses."""

    def slices(self, sizes: Sequence[int]) -> Iterator[Pose]:
        """Slices of these sizes; a single slice is the user's own object."""
        if len(sizes) < 2:
            return iter([self.poses] * len(sizes))
        return self.parts(sizes)

    def extents(self) -> Sequence[float] | None:
        """The relative sizes of the poses; None if all are alike."""
        return None

    def bytes(self) -> int:
        """The size of its tensors."""
        return bytes_of(tensors_of(self.poses))


@final
class _Stacked(Batch):
    """A tensor, or a container of tensors with the same dimension 0."""

    def parts(self, sizes: Sequence[int]) -> Iterator[Pose]:
        pieces = [_split(tensor, sizes) for tensor in tensors_of(self.poses)]
        for own in zip(*pieces, strict=True):
            following = iter(own)
            yield map_tensors(lambda _, own=following: next(own), self.poses)  # type: ignore[misc]

    def picked(self, numbers: Sequence[int]) -> Pose:
        return map_tensors(lambda tensor: _rows(tensor, numbers), self.poses)

    def followed_by(self, others: Sequence[Pose]) -> Pose:
        columns = zip(*map(tensors_of, [self.poses, *others]), strict=True)
        joined = iter([_joined(column) for column in columns])
        return map_tensors(lambda _: next(joined), self.poses)

    def pose(self, number: int) -> Pose:
        return map_tensors(lambda tensor: tensor[number], self.poses)

    def extents(self) -> Sequence[float] | None:
        """The sizes of the poses in the first nested tensor; None if there is none."""
        nested = next((t for t in tensors_of(self.poses) if t.is_nested), None)
        return None if nested is None else [float(row.numel()) for row in nested.unbind()]


@final
class _Divisible(Batch):
    """A container that knows its batch size and can split itself, such as a TensorDict."""

    def parts(self, sizes: Sequence[int]) -> Iterator[Pose]:
        return iter(self.poses.split(list(sizes)))

    def picked(self, numbers: Sequence[int]) -> Pose:
        return self.poses[list(numbers)]

    def followed_by(self, others: Sequence[Pose]) -> Pose:
        return torch.cat([self.poses, *others])

    def pose(self, number: int) -> Pose:
        return self.poses[number]


@final
class _Graphs(Batch):
    """A PyTorch Geometric Batch, which slices and joins its graphs itself."""

    def parts(self, sizes: Sequence[int]) -> Iterator[Pose]:
        start = 0
        for size in sizes:
            yield self.picked(range(start, start + size))
            start += size

    def picked(self, numbers: Sequence[int]) -> Pose:
        return self._of([self.poses.get_example(number) for number in numbers])

    def followed_by(self, others: Sequence[Pose]) -> Pose:
        return self._of(
            [graph for batch in (self.poses, *others) for graph in batch.to_data_list()]
        )

    def pose(self, number: int) -> Pose:
        return self.poses.get_example(number)

    def extents(self) -> Sequence[float] | None:
        """The numbers of nodes, of all kinds together."""
        starts = [store["ptr"] for store in self.poses.stores if "ptr" in store]
        if not starts:
            return None
        return [float(nodes) for nodes in torch.stack(starts).sum(dim=0).diff().tolist()]

    def _of(self, graphs: list[Any]) -> Pose:
        return type(self.poses).from_data_list(graphs, follow_batch=self._followed())

    def _followed(self) -> list[str]:
        """The attributes, besides the nodes, that it was made to follow (`follow_batch`)."""
        ends = "_batch"
        names = {key for store in self.poses.stores for key in store}
        numbered = {key.removesuffix(ends) for key in names if key.endswith(ends)}
        return sorted(key for key in numbered if {key, f"{key}_ptr"} <= names)


def as_batch(poses: object) -> Batch | None:
    """The batch that the poses are; None if they are to be walked.

    Raises:
        PosesError: if they are one object that is no batch.
        ShapeMismatchError: if they are a tensor without dimensions.
    """
    if isinstance(poses, Tensor):
        if poses.ndim == 0:
            raise ShapeMismatchError(
                "The poses are a tensor without dimensions; its rows would be the poses.\n"
                "Pass a stacked tensor [m, ...] or a list of poses."
            )
        return _Stacked(poses, poses.size(0)) if poses.layout in _SLICED else None
    if is_graph(poses):
        return _Graphs(poses, _graphs_in(poses))
    if not _is_container(poses):
        return None
    if isinstance(poses, Mapping) and callable(getattr(poses, "split", None)):
        sizes: Sequence[int] = getattr(poses, "batch_size", ())
        if len(sizes):
            return _Divisible(poses, sizes[0])
    return _Stacked(poses, _count_in(poses))


def joined_by_pyg(poses: Sequence[Pose]) -> Pose:
    """Joins graphs of PyTorch Geometric into a Batch.

    Raises:
        ValueError: if the poses are no such graphs, since nobody has said how to join them.
    """
    if not all(map(is_graph, poses)):
        kind = type(poses[0]).__name__
        raise ValueError(
            f"The poses come one by one, each a {kind}, and several are to be scored together, so "
            f"the engine must know how to join them. Pass Engine(..., collate=torch.stack), or the "
            f"poses as a batch: a stacked tensor, or a mapping of stacked tensors."
        )
    return sys.modules["torch_geometric.data"].Batch.from_data_list(list(poses))


def _split(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    if tensor.is_nested:
        starts = [0, *accumulate(sizes)]
        return [_rows(tensor, range(a, b)) for a, b in pairwise(starts)]
    # One node for all slices: its backward is a single `cat`.
    pieces: Sequence[Tensor] = tensor.split(list(sizes))  # type: ignore[no-untyped-call]
    return pieces


def _rows(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    if not tensor.is_nested:
        return tensor[list(numbers)]
    rows = tensor.unbind()
    return torch.nested.as_nested_tensor([rows[i] for i in numbers], layout=tensor.layout)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_nested:
        return torch.cat(list(tensors))
    rows = [row for tensor in tensors for row in tensor.unbind()]
    return torch.nested.as_nested_tensor(rows, layout=tensors[0].layout)


def _is_container(poses: object) -> bool:
    if isinstance(poses, Mapping):
        return True
    named = isinstance(poses, tuple) and hasattr(poses, "_fields")
    data = dataclasses.is_dataclass(poses) and not isinstance(poses, type | Dataset)
    return named or data


def _graphs_in(poses: Any) -> int:
    if not hasattr(poses, "to_data_list"):
        raise PosesError(
            f"poses is a {type(poses).__name__}, one graph, whose attributes would be scored one "
            f"by one.\nPass [pose]."
        )
    return int(poses.num_graphs)


def _count_in(poses: Any) -> int:
    """The number of poses in a container: the size of dimension 0 of all its tensors."""
    found = dict(_leaves(poses, ""))
    sizes = {name: list(t.shape) for name, t in found.items() if isinstance(t, Tensor)}
    odd = [name for name, leaf in found.items() if not isinstance(leaf, Tensor)]
    kind = type(poses).__name__
    if odd:
        raise PosesError(
            f"poses is a {kind}, which would be a batch, but {listed(odd)} cannot be sliced along "
            f"the poses as its tensors are.\nLeave it out, or make a tensor of it; or pass a list "
            f"of poses, which is walked: [pose] if it is one."
        )
    counts = {shape[0] if shape else None for shape in sizes.values()}
    if len(counts) == 1 and None not in counts:
        (count,) = counts
        return int(count or 0)
    if not sizes:
        raise PosesError(
            f"poses is a {kind}, which would be a batch, but it holds no tensor.\n"
            f"Pass [pose] if it is one pose, or list(poses.values()) if it holds several."
        )
    shown = listed([f"{name} {shape}" for name, shape in sizes.items()])
    raise PosesError(
        f"poses is a {kind}, which would be a batch, but dimension 0 of its tensors is not the "
        f"same for all: {shown}.\n"
        f"Pass [pose] if it is one pose, or list(poses.values()) if it holds several."
    )


def _leaves(item: object, name: str) -> Iterator[tuple[str, object]]:
    """The tensors by name, and the objects that hold several things but no tensor."""
    items = items_of(item)
    if isinstance(item, Tensor):
        yield name, item
    elif items is not None:
        inside = [leaf for key, part in items.items() for leaf in _leaves(part, f"{name}.{key}")]
        yield from ((path.removeprefix("."), leaf) for path, leaf in inside)
        listing = isinstance(item, list | tuple) and any(part is not None for part in item)
        if listing and not inside:
            yield name, item
    elif isinstance(item, Sized) and not isinstance(item, str | bytes):
        yield name, item
