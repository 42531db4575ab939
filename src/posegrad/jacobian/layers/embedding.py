"""Lookup tables."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout

__all__ = ["Embedding", "EmbeddingBag"]


@dataclass(frozen=True)
class Table(ClosedForm):
    """A table `[V, ...]`: cotangents are added up where their indices point.

    Args:
        padding: An index that gets no gradient, or None.
    """

    padding: int | None

    def _added(self, indices: Tensor, entries: Tensor, owners: Tensor, count: int) -> Tensor:
        """`[count, *shape]`, from indices and owners `[N]` and entries `[N, ...]`."""
        height = self.shape[0]
        entries = entries.reshape(len(indices), self.shape[1:].numel())
        if self.padding is not None:
            entries = entries.masked_fill((indices == self.padding).unsqueeze(1), 0)
        table = entries.new_zeros(count * height, entries.shape[1])
        places = owners.clamp(min=0) * height + indices % height
        return table.index_add_(0, places, entries).reshape(count, *self.shape)


@final
@dataclass(frozen=True)
class Embedding(Table):
    """A table whose rows were looked up.

    Args:
        indices: The rows, of any shape.
    """

    indices: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return all(dim < self.indices.tensor.ndim for dim in layout.dims)

    def vjp(self, cotangent: Tensor) -> Tensor:
        indices = self.indices.value.reshape(-1)
        return self._added(indices, cotangent, torch.zeros_like(indices), 1)[0]

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        indices = layout.front(self.indices.value)  # [R, ...]
        owners = layout.owners.reshape(-1, *[1] * (indices.ndim - 1)).expand_as(indices)
        entries = layout.front(cotangent)
        return self._added(indices.reshape(-1), entries, owners.reshape(-1), layout.count)


@final
@dataclass(frozen=True)
class EmbeddingBag(Table):
    """A table whose rows were looked up and summed bag by bag.

    Args:
        indices: The rows, `[N]`.
        bags: The bag each went into, `[N]`.
        scale: What each was multiplied by, `[N]`.
    """

    indices: Factor
    bags: Factor
    scale: Factor

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        indices = self.indices.value
        return self._added(indices, self._entries(cotangent), torch.zeros_like(indices), 1)[0]

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        owners = layout.owners[self.bags.value]
        return self._added(self.indices.value, self._entries(cotangent), owners, layout.count)

    def _entries(self, cotangent: Tensor) -> Tensor:
        """The cotangent of every row that was looked up, `[N, d]`."""
        return cotangent[self.bags.value] * self.scale.value.to(cotangent.dtype).unsqueeze(1)
