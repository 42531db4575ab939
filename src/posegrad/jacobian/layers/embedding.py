"""Lookup tables."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout

__all__ = ["Embedding"]


@final
@dataclass(frozen=True)
class Embedding(ClosedForm):
    """The table of an embedding, `[V, d]`: cotangents are added up where their indices point.

    Args:
        indices: The rows that were looked up, of any shape.
        padding: An index that gets no gradient, or None.
    """

    indices: Factor
    padding: int | None

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return len(cotangent) - 1 not in layout.dims

    def vjp(self, cotangent: Tensor) -> Tensor:
        places = self.indices.value.reshape(-1)
        return self._added(places, cotangent.reshape(-1, self.shape[1]), self.shape[0])

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        entries = layout.front(cotangent).reshape(-1, self.shape[1])  # [R T, d]
        indices = layout.front(self.indices.value)  # [R, ...]
        owners = layout.owners.reshape(-1, *[1] * (indices.ndim - 1)).expand_as(indices)
        places = (owners.clamp(min=0) * self.shape[0] + indices).reshape(-1)
        table = self._added(places, entries, layout.count * self.shape[0])
        return table.reshape(layout.count, *self.shape)

    def _added(self, places: Tensor, entries: Tensor, height: int) -> Tensor:
        if self.padding is not None:
            entries = entries.masked_fill((places % self.shape[0] == self.padding).unsqueeze(1), 0)
        return entries.new_zeros(height, self.shape[1]).index_add_(0, places, entries)
