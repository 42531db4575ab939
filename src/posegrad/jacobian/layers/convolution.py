"""Convolutions, transposed ones included."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout

__all__ = ["Convolution"]


@final
@dataclass(frozen=True)
class Convolution(ClosedForm):
    """The kernel of a convolution of any kind over `[N, C, ...]`.

    Every pose takes one call of torch's own weight gradient on its images alone; together they
    cost little more than the one call of a plain backward.

    Args:
        input: The images.
        options: stride, padding, dilation, transposed, output padding and groups, as torch's
            operator takes them.
    """

    input: Factor
    options: tuple[Any, ...]

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._of(self.input.value, cotangent)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        pairs = zip(
            layout.segments(self.input.value), layout.segments(cotangent), strict=True
        )  # [T, C, ...] each
        gradients = cotangent.new_empty(layout.count, *self.shape)
        for row, (images, own) in zip(gradients, pairs, strict=True):
            row.copy_(self._of(images, own))  # while it is in the cache
        return gradients

    def _of(self, images: Tensor, cotangent: Tensor) -> Tensor:
        if len(images) == 0:
            return cotangent.new_zeros(self.shape)
        shape_only = cotangent.new_zeros(()).expand(self.shape)
        only_weight = [False, True, False]
        gradient: Tensor
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangent, images.to(cotangent.dtype), shape_only, None, *self.options, only_weight
        )
        return gradient
