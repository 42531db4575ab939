"""The scale of a normalisation: layer, batch, group."""

from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import Factor
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._record import record
from posegrad.jacobian.layers.elementwise import Broadcast

__all__ = ["GroupNormScale", "NormScale"]


@final
@record
class NormScale(Broadcast):
    r"""The scale of :math:`y = \gamma \circ (x - \mu)\,\rho + \beta`, from the saved statistics.

    Args:
        input: x.
        mean: The means, with a 1 for each normalised dimension. They are held fixed: how they
            depend on other parameters is in those parameters' cotangents.
        inverse_deviation: The inverse deviations, likewise.
    """

    input: Factor
    mean: Factor
    inverse_deviation: Factor

    def contribution(self, cotangent: Tensor) -> Tensor:
        x, mean, rho = (
            factor.value.to(cotangent.dtype)
            for factor in (self.input, self.mean, self.inverse_deviation)
        )
        return (x - mean).mul_(rho).mul_(cotangent)


@final
@record
class GroupNormScale(Broadcast):
    r"""The scale of a group norm over `[N, C, ...]`.

    With one image a pose, the gradients are those of one group norm in which every image's groups
    are groups of channels: `[1, N C, ...]`. Its kernel reads the images and the cotangents once.

    Args:
        input: The images.
        mean: The mean of each group, `[N, G]`, held fixed as in `NormScale`.
        inverse_deviation: The inverse deviations, likewise.
    """

    input: Factor
    mean: Factor
    inverse_deviation: Factor

    def contribution(self, cotangent: Tensor) -> Tensor:
        x = self.input.value.to(cotangent.dtype)
        mean, rho = (
            t.repeat_interleave(x.shape[1] // t.shape[1], dim=1).reshape(
                *x.shape[:2], *[1] * (x.ndim - 2)
            )
            for t in self._statistics(cotangent)
        )
        return (x - mean).mul_(rho).mul_(cotangent)

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        if layout.dims != (0,) or cotangent.numel() == 0:
            return super().rows(cotangent, layout)
        images, channels = cotangent.shape[:2]
        merged = (1, images * channels, -1)
        mean, rho = (t.reshape(1, -1) for t in self._statistics(cotangent))
        each: Tensor
        _, each, _ = torch.ops.aten.native_group_norm_backward(
            cotangent.reshape(merged), self.input.value.to(cotangent.dtype).reshape(merged),
            mean, rho, cotangent.new_ones(merged[1]), 1, merged[1],
            cotangent[0, 0].numel(), mean.shape[1], [False, True, False],
        )  # fmt: skip
        return layout.sum(layout.front(each.view(images, channels)))

    def _statistics(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.mean.value.to(cotangent.dtype),
            self.inverse_deviation.value.to(cotangent.dtype),
        )
