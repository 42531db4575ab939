"""Which elements of an output belong to one pose."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Arrangement"]


@final
@dataclass(frozen=True)
class Arrangement:
    """How the elements of an output are numbered: m poses of K components each.

    Args:
        shape: The output's shape.
        dim: The dimension that counts poses; None if every element is a pose of its own (K = 1).
    """

    shape: torch.Size
    dim: int | None

    @property
    def poses(self) -> int:
        """The number of poses."""
        return self.shape.numel() if self.dim is None else self.shape[self.dim]

    @property
    def components(self) -> int:
        """The number of components of each pose."""
        return 1 if self.dim is None else self.shape.numel() // self.poses

    def split(self, flat: Tensor) -> Tensor:
        """From `[m K, ...]`, in the order of the flattened output, to `[m, K, ...]`."""
        if self.dim is None:
            return flat.unsqueeze(1)
        shaped = flat.reshape(*self.shape, *flat.shape[1:])
        return shaped.movedim(self.dim, 0).reshape(self.poses, self.components, *flat.shape[1:])

    def picked(self, index: Tensor) -> tuple["Arrangement", Tensor, Tensor]:
        """The arrangement of part of the output, and which poses and components it has.

        Args:
            index: Numbers along the output's dimension 0.
        """
        shape = torch.Size([len(index), *self.shape[1:]])
        every = torch.arange(self.components, device=index.device)
        if self.dim is None:
            inner = shape[1:].numel()
            numbers = index.unsqueeze(1) * inner + torch.arange(inner, device=index.device)
            return Arrangement(shape, None), numbers.reshape(-1), every
        if self.dim == 0:
            return Arrangement(shape, 0), index, every
        others = [size for dim, size in enumerate(self.shape) if dim != self.dim]
        poses = torch.arange(self.poses, device=index.device)
        return Arrangement(shape, self.dim), poses, every.reshape(others)[index].reshape(-1)

    def join(self, split: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.dim is None:
            return split.squeeze(1)
        others = [size for dim, size in enumerate(self.shape) if dim != self.dim]
        shaped = split.reshape(self.poses, *others, *split.shape[2:])
        return shaped.movedim(0, self.dim).flatten(0, len(self.shape) - 1)
