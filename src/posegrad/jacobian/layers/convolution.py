"""Convolutions, transposed ones included."""

from typing import Any, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._record import record

__all__ = ["Convolution"]


@final
@record
class Convolution(ClosedForm):
    """The kernel of a convolution of any kind over `[N, C, ...]`.

    With one image a pose, the kernels' gradients are those of one convolution in which every image
    is a group of channels: `[1, N C, ...]`. It costs little more than the one call of a plain
    backward, 1.1 to 1.4 times on a CPU.

    Args:
        input: The images.
        options: stride, padding, dilation, transposed, output padding and groups, as torch's
            operator takes them.
    """

    input: Factor
    options: tuple[Any, ...]

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return layout.dims == (0,)

    @property
    def positions(self) -> tuple[int, ...]:
        return (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._summed(self.input.value, cotangent)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        images = self.input.value
        if layout.is_regular():
            pairs = zip(
                layout.by_pose(images).unbind(1), layout.by_pose(cotangent).unbind(1), strict=True
            )  # T of [m, C, ...]
            if layout.size <= layout.count**2:  # T <= m
                first, *others = [self._apart(*pair) for pair in pairs]
                for other in others:
                    first += other
                return first
        gradients = cotangent.new_empty(layout.count, *self.shape)
        segments = layout.segments(images), layout.segments(cotangent)  # [T, C, ...] each
        for row, own, b in zip(gradients, *segments, strict=True):
            row.copy_(self._summed(own, b))  # while it is in the cache
        return gradients

    def _summed(self, images: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient of all images together, `[*shape]`."""
        if len(images) == 0:
            return cotangent.new_zeros(self.shape)
        return self._of(images, cotangent, 1)

    def _apart(self, images: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient of each image, `[N, *shape]`."""
        one = images.flatten(0, 1).unsqueeze(0), cotangent.flatten(0, 1).unsqueeze(0)
        return self._of(*one, len(images)).reshape(len(images), *self.shape)

    def _of(self, images: Tensor, cotangent: Tensor, copies: int) -> Tensor:
        shape = copies * self.shape[0], *self.shape[1:]
        shape_only = cotangent.new_zeros(()).expand(shape)
        *options, groups = self.options
        images = images.to(cotangent.dtype)
        if images.shape[2:].numel() == 1:  # else torch may take it for channels last, and fail
            images, cotangent = _in_order(images), _in_order(cotangent)
        gradient: Tensor
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangent, images, shape_only, None, *options, copies * groups, [False, True, False]
        )
        return gradient


def _in_order(tensor: Tensor) -> Tensor:
    """The tensor with the strides of its shape, also along dimensions of size one."""
    return tensor.reshape(-1).view(tensor.shape)
