"""Matrix products with a weight: linear layers, projections, weights on either side."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor
from posegrad.jacobian._layout import Layout

__all__ = ["Linear"]


@final
@dataclass(frozen=True)
class Linear(ClosedForm):
    r"""The weight W of :math:`Y = A W^\top`, for A `[R, d]` and Y `[R, p]`.

    .. math::
        \frac{\partial \hat y_i}{\partial W} = \sum_{r \in R_i} b_r a_r^\top, \qquad
        \langle g_i, g_j \rangle = \sum_{r \in R_i} \sum_{s \in R_j}
            (a_r \cdot a_s)(b_r \cdot b_s)

    with :math:`R_i` the rows of pose i and :math:`b_r` their cotangents. The second identity needs
    no gradient at all: with one row a pose, the Gramian is :math:`(A A^\top) \circ (B B^\top)`.

    Args:
        input: A, laid out as Y but for its last dimension.
        flipped: Whether the parameter is :math:`W^\top` `[d, p]`.
        on_left: Whether the operator was :math:`Y = W A^\top`, so that cotangents come as `[p, R]`
            and A as `[d, R]`.
        scale: A number the product was multiplied by.
    """

    input: Factor
    flipped: bool
    on_left: bool
    scale: float

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return self._features not in layout.dims

    def vjp(self, cotangent: Tensor) -> Tensor:
        a, b = self._rows_last(self.input.value), self._rows_last(cotangent)
        return self._turned(b.mT @ a.to(b.dtype))  # [p, d]

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        inputs, cotangents = self.input.value.to(cotangent.dtype), cotangent
        if layout.is_regular():
            a, b = layout.by_pose(inputs), layout.by_pose(cotangents)  # [m, T, ..., d]
            a, b = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, b))  # [m, T, d]
            return self._turned(b.mT @ a)
        pairs = zip(layout.segments(inputs), layout.segments(cotangents), strict=True)
        return self._turned(torch.stack([b.flatten(0, -2).mT @ a.flatten(0, -2) for a, b in pairs]))

    def inner(
        self, cotangent: Tensor, layout: Layout, other: "Linear", across: Tensor, beside: Layout
    ) -> Tensor:
        """The inner products of the gradients of two uses of the weight, `[m, m']`.

        Time `R R' (d + p)` and memory `R R'`; no gradient is formed.
        """
        a, b, first = self._flat(cotangent, layout)
        c, d, second = other._flat(across, beside)
        products = (a @ c.mT) * (b @ d.mT)  # [R, R']
        products = products * (self.scale * other.scale)
        return second.sum(first.sum(products).mT).mT

    def inner_cost(self, cotangent: Tensor) -> tuple[int, int]:
        """R, the rows of one use, and d + p, the price of one pair of them."""
        rows = cotangent.numel() // cotangent.shape[self._features]
        return rows, self.shape[0] + self.shape[1]

    @property
    def _features(self) -> int:
        """The dimension of cotangents that runs over p."""
        return 0 if self.on_left else self.input.tensor.ndim - 1

    def _rows_last(self, tensor: Tensor) -> Tensor:
        """`[R, features]`."""
        return tensor.mT if self.on_left else tensor.reshape(-1, tensor.shape[-1])

    def _flat(self, cotangent: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout]:
        """A, B as `[R, features]`, and the layout of their rows."""
        a, b = self.input.value.to(cotangent.dtype), cotangent
        if self.on_left:
            a, b = a.mT, b.mT  # rows first
            layout = replace(layout, dims=tuple(1 - dim for dim in layout.dims))
        a, b = layout.front(a), layout.front(b)
        each = b[0].numel() // b.shape[-1] if len(b) else 1
        owners = layout.owners.repeat_interleave(each) if each != 1 else layout.owners
        flat = Layout.along(layout.count, 0, owners)
        return a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), flat

    def _turned(self, gradient: Tensor) -> Tensor:
        if self.scale != 1:
            gradient = gradient * self.scale
        return gradient.mT if self.flipped else gradient
