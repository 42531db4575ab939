"""Which pose owns each row of a tensor, and along which dimensions the rows lie."""

from collections.abc import Iterator
from functools import cached_property
from typing import Self, final

import torch
from torch import Tensor

from posegrad.jacobian._record import record

__all__ = ["NOBODY", "WHOLE", "Layout", "single"]

NOBODY = -1
"""The owner of a row that no prediction depends on; the cotangent of such a row is zero."""

WHOLE = -1
"""Stands for the dimension of rows where one pose owns the whole tensor."""


@final
@record
class Layout:
    r"""The owners of a tensor's rows, and sums over the rows of each owner.

    In front of a layer, a cotangent has one or more *rows* for each pose: `[m, p]` has one,
    `[m, T, p]` and `[T, m, p]` have T along another dimension, `[m T, p]` has T along the same,
    and a ragged batch of graphs has one for each atom. `dims` are the dimensions along which the
    owner changes; merged, they count the rows.

    Args:
        count: m, the number of poses.
        dims: Dimensions that count rows, in order. `()` if one pose owns the whole tensor.
        stated: The owner of every row, `[R]`; `NOBODY` where it does not matter. None if owners
            follow a pattern.
        pattern: R and `stride`, if known.
        device: The device of the owners, if they follow a pattern.
    """

    count: int
    dims: tuple[int, ...]
    stated: Tensor | None
    pattern: tuple[int, int] | None = None
    device: torch.device | None = None

    @classmethod
    def along(cls, count: int, dim: int, owners: Tensor) -> Self:
        """The layout of a tensor whose rows lie along one dimension."""
        return cls(count, (dim,), owners, device=owners.device)

    @classmethod
    def regular(
        cls, count: int, dim: int, size: int, stride: int, device: torch.device | None
    ) -> Self:
        """A layout of `size` rows along a dimension: poses take turns, `stride` rows at a time."""
        return cls(count, (dim,), None, (size, stride), device)

    def owned(self, dim: int, owners: Tensor) -> "Layout":
        """The layout with other owners of the same poses, along a dimension or whole."""
        return Layout(self.count, () if dim == WHOLE else (dim,), owners, device=owners.device)

    def moved(self, dim: int) -> "Layout":
        """The same rows along another dimension."""
        return Layout(self.count, (dim,), self.stated, self.pattern, self.device)

    def patterned(self, size: int, stride: int) -> "Layout":
        """A layout of other rows along the same dimension, in a pattern."""
        return Layout(self.count, self.dims, None, (size, stride), self.device)

    @property
    def is_whole(self) -> bool:
        """Whether one pose owns the whole tensor."""
        return not self.dims

    @property
    def dim(self) -> int:
        """The single dimension along which rows lie, or `WHOLE`."""
        return self.dims[0] if self.dims else WHOLE

    @cached_property
    def owners(self) -> Tensor:
        """The pose of every row, `[R]`."""
        if self.stated is not None:
            return self.stated
        return self.spread(torch.arange(self.count, device=self.device))

    @property
    def size(self) -> int:
        """R, the number of rows."""
        return len(self.owners) if self.pattern is None else self.pattern[0]

    def front(self, tensor: Tensor) -> Tensor:
        """`tensor` with its rows as dimension 0: `[R, ...]`."""
        if not self.dims:
            return tensor.unsqueeze(0)
        if self.dims != (0,):
            tensor = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        return tensor.flatten(0, len(self.dims) - 1) if len(self.dims) > 1 else tensor

    @cached_property
    def stride(self) -> int | None:
        r"""s, if row r belongs to pose :math:`\lfloor r / s \rfloor \bmod m`; None if irregular.

        Rows without owner fit any pattern: their cotangents are zero.
        """
        if self.pattern is not None:
            return self.pattern[1]
        rows = self.size
        if rows == 0 or rows % self.count:
            return None
        places = torch.arange(rows, device=self.owners.device)
        anyone = self.owners == NOBODY
        for stride in _divisors(rows // self.count):
            expected = places.div(stride, rounding_mode="floor") % self.count
            if bool(((self.owners == expected) | anyone).all()):
                return stride
        return None

    @property
    def is_one_each(self) -> bool:
        """Whether row i of a matrix belongs to pose i, and there are no other rows."""
        return self.dims == (0,) and self.size == self.count and self.stride == 1

    def by_pose(self, tensor: Tensor) -> Tensor:
        """The rows of each pose together, `[m, R / m, ...]`; only for regular layouts."""
        assert self.stride is not None
        rows = self.front(tensor)
        outer = len(rows) // (self.count * self.stride)
        grid = rows.reshape(outer, self.count, self.stride, *rows.shape[1:])
        return grid.transpose(0, 1).flatten(1, 2)

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each pose owns."""
        return torch.bincount(self._live_owners, minlength=self.count).tolist()

    def segments(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of each pose, as one tensor `[R_i, ...]` each."""
        if self.stride is not None:
            return self.by_pose(tensor).unbind(0)
        return self.in_turn(tensor).split_with_sizes(self.sizes)

    def in_turn(self, tensor: Tensor) -> Tensor:
        """The rows of the first pose, then those of the second, ..., `[R, ...]`; no dead ones."""
        rows = self.front(tensor)
        return rows if self._is_in_order else rows[self._order]

    def groups(self, *tensors: Tensor) -> Iterator[tuple[Tensor | slice, list[Tensor]]]:
        """The rows of each pose together, for poses with about equally many rows at a time.

        Yields:
            The poses, `[k]`, and for each tensor their rows, `[k, T, ...]`, padded with zeros.
                Poses without rows are left out.
        """
        if self.stride is not None:
            yield slice(None), [self.by_pose(tensor) for tensor in tensors]
            return
        fronts = [self.front(tensor) for tensor in tensors]
        for poses, places, is_absent in self._groups:
            found = [rows[places] for rows in fronts]
            for rows in found:
                rows.masked_fill_(is_absent.reshape(*places.shape, *[1] * (rows.ndim - 2)), 0)
            yield poses, found

    @property
    def lengths(self) -> list[int]:
        """The number of rows T in each of `groups`."""
        if self.stride is not None:
            return [self.size // self.count]
        return [places.shape[1] for _, places, _ in self._groups]

    def sum(self, rows: Tensor) -> Tensor:
        """Adds up the rows of each pose: `[R, ...]`, as `front` gives them, to `[m, ...]`."""
        if self.stride is not None:
            outer = len(rows) // (self.count * self.stride)
            if len(rows) == self.count:
                return rows
            return rows.reshape(outer, self.count, self.stride, *rows.shape[1:]).sum((0, 2))
        total = rows.new_zeros(self.count, *rows.shape[1:])
        if self.has_dead_rows:
            rows = rows[self.owners != NOBODY]
        return total.index_add_(0, self._live_owners, rows)

    def dots(self, first: Tensor, second: Tensor) -> Tensor:
        """The inner products of two tensors, taken over the rows of each pose, `[m]`.

        Args:
            first: A tensor of this layout.
            second: Another one, or a tensor that broadcasts against it.
        """
        last = first.ndim - 1
        if second.ndim == 1 and last not in self.dims and len(second) == first.shape[-1]:
            terms = first @ second  # [...], without its last dimension
        else:
            terms = first * second
        others = [dim for dim in range(terms.ndim) if dim not in self.dims]
        terms = terms.sum(others) if others else terms
        if self.dims:
            return self.sum(terms.reshape(-1))
        total = terms.new_zeros(self.count)
        owner = self.owners
        return total if int(owner) < 0 else total.index_copy_(0, owner, terms.reshape(1))

    def spread(self, values: Tensor) -> Tensor:
        """Repeats the value of each pose, `[m]`, for each of its rows: `[R]`."""
        if self.pattern is None:
            return values[self.owners.clamp(min=0)]
        size, stride = self.pattern
        if size == self.count:
            return values
        outer = size // (self.count * stride)
        return values.reshape(1, -1, 1).expand(outer, self.count, stride).reshape(-1)

    def weigh(self, tensor: Tensor, weights: Tensor) -> Tensor:
        """`tensor` with every row multiplied by the weight `[m]` of its owner."""
        weights = weights.to(tensor.device, tensor.dtype)
        if self.is_one_each and tensor.ndim == 2:
            return tensor * weights.unsqueeze(1)
        values = self.spread(weights)
        shape = [size if dim in self.dims else 1 for dim, size in enumerate(tensor.shape)]
        return tensor * values.reshape(shape)

    def picked(self, poses: Tensor, dim: int, inner: int) -> tuple["Layout", Tensor]:
        """The layout of some poses only, and the numbers of their rows in `front`.

        Args:
            poses: Their numbers in the wanted order; some may come twice.
            dim: The dimension along which their rows will lie.
            inner: How many adjacent rows each row becomes there.
        """
        if self.stride is not None:
            numbers = torch.arange(self.size, device=poses.device)
            rows = numbers.reshape(-1, self.count, self.stride).transpose(0, 1).flatten(1)  # [m, T]
            each = rows.shape[1] * inner
            layout = Layout.regular(len(poses), dim, len(poses) * each, each, self.device)
            return layout, rows[poses].reshape(-1)
        order, sizes = self._order, torch.tensor(self.sizes, device=self.owners.device)
        ends = sizes.cumsum(0)
        places = [order[int(ends[i] - sizes[i]) : int(ends[i])] for i in poses.tolist()]
        owners = torch.arange(len(poses), device=order.device)
        owners = owners.repeat_interleave(sizes[poses] * inner)
        return Layout.along(len(poses), dim, owners), torch.cat(places)

    def only(self, tensor: Tensor, pose: int) -> Tensor:
        """`tensor` with zeros in place of the rows of all other poses."""
        shape = [size if dim in self.dims else 1 for dim, size in enumerate(tensor.shape)]
        return torch.where((self.owners == pose).reshape(shape), tensor, 0)

    @cached_property
    def has_dead_rows(self) -> bool:
        """Whether some rows have no owner."""
        return self.pattern is None and not bool((self.owners != NOBODY).all())

    def has_strays(self, tensor: Tensor) -> bool:
        """Whether rows without owner are not all zero: zero times infinity is not zero."""
        if not self.has_dead_rows:
            return False
        return bool(self.front(tensor)[self.owners == NOBODY].any())

    def says_as(self, other: "Layout") -> bool:
        """Whether another layout of as many poses is equal, and said in the same way."""
        if (self.dims, self.pattern, self.device) != (other.dims, other.pattern, other.device):
            return False
        one, two = self.stated, other.stated
        return one is two or (one is not None and two is not None and torch.equal(one, two))

    def is_regular(self) -> bool:
        """Whether every pose owns the same number of rows, in a fixed pattern."""
        return self.stride is not None

    def to(self, device: torch.device | str) -> Self:
        """The layout on a device."""
        if self.device == torch.device(device):
            return self
        stated = None if self.stated is None else self.stated.to(device)
        return type(self)(self.count, self.dims, stated, self.pattern, torch.device(device))

    @cached_property
    def _is_in_order(self) -> bool:
        """Whether the poses follow each other in order, as in most batches."""
        owners = self.owners
        return not self.has_dead_rows and bool((owners[1:] >= owners[:-1]).all())

    @cached_property
    def _groups(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Poses grouped by size, within a factor of two; where their rows are, and where none are.

        So at most half of the multiplied numbers are zeros, and there are few groups.
        """
        order = self._order
        sizes = torch.tensor(self.sizes, device=order.device)
        starts = sizes.cumsum(0) - sizes
        powers = [size.bit_length() for size in self.sizes]
        groups = []
        for power in sorted({*powers} - {0}):
            poses = (torch.tensor(powers, device=order.device) == power).nonzero().squeeze(1)
            turns = torch.arange(int(sizes[poses].max()), device=order.device)
            places = (starts[poses].unsqueeze(1) + turns).clamp(max=len(order) - 1)
            groups.append((poses, order[places], turns >= sizes[poses].unsqueeze(1)))
        return groups

    @cached_property
    def _order(self) -> Tensor:
        order = torch.argsort(self.owners, stable=True)
        return order[len(order) - len(self._live_owners) :]  # NOBODY sorts first

    @cached_property
    def _live_owners(self) -> Tensor:
        return self.owners[self.owners != NOBODY] if self.has_dead_rows else self.owners


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def single(tensor: Tensor) -> Layout:
    """The layout of a tensor that belongs to a single pose."""
    return Layout(1, (), torch.zeros(1, dtype=torch.long, device=tensor.device))
