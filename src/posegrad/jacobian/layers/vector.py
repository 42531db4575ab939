"""Products of a matrix with a vector of weights."""

from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._record import record

__all__ = ["Vector"]


@final
@record
class Vector(ClosedForm):
    r"""The weights w of :math:`y = A w`, for A `[R, d]`.

    .. math:: \frac{\partial \hat y_i}{\partial w} = \sum_{r \in R_i} b_r a_r

    Args:
        input: A.
    """

    input: Factor

    @property
    def positions(self) -> tuple[int, ...]:
        return (0,)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return cotangent @ self.input.value.to(cotangent.dtype)

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        return self.input.like(direction) @ direction

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        a = self.input.value.to(cotangent.dtype)
        if layout.is_regular():
            return (layout.by_pose(cotangent).unsqueeze(1) @ layout.by_pose(a)).squeeze(1)
        pairs = zip(layout.segments(cotangent), layout.segments(a), strict=True)
        return torch.stack([own @ rows for own, rows in pairs])
