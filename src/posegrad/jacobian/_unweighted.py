"""Divides the weights out of parts that were read in a weighted backward."""

from collections.abc import Collection
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from posegrad._torch import memory_of
from posegrad.errors import NonFiniteGradientError
from posegrad.jacobian._arrangement import Arrangement
from posegrad.jacobian._layout import NOBODY, Layout
from posegrad.jacobian._parts import Factors, Part, Rows
from posegrad.jacobian._precision import wide

__all__ = ["Unweighted"]


@final
class Unweighted:
    r"""Divides the weights out of rows that were read during somebody else's backward.

    What is heard under the cotangents w is :math:`\operatorname{diag}(w) J`. A cotangent is linear
    in w: each row is that of J times the weight of its owner, so it is divided by that weight. Rows
    of weight zero tell nothing about J and are left out.

    Args:
        weights: w, in the output's shape.
        arrangement: The poses in the output, of one component each.
        foreign: The memory that others may write to; parts that lie there are copied.
    """

    def __init__(
        self, weights: Tensor, arrangement: Arrangement, foreign: Collection[int] = ()
    ) -> None:
        flat = wide(weights).reshape(-1)  # [M], in the order of the poses
        self.kept = flat != 0
        self.count = int(torch.count_nonzero(flat))
        self.arrangement = arrangement
        self._numbers: Tensor | None = None  # the rows that are left
        self._foreign = foreign
        self._weights, self._own = flat, flat
        if self.count < len(flat):
            self._own = flat[self.kept]
            self.arrangement = Arrangement(self._own.shape, None)
            self._numbers = torch.where(self.kept, self.kept.cumsum(0) - 1, NOBODY)
        first = float(self._own[0]) if self.count else 1.0
        self._even = first if bool((self._own == first).all()) else None
        self._layouts: dict[int, tuple[Layout, Layout]] = {}  # kept alive, so that no id is reused
        self._cotangents: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, part: Part) -> Part:
        """The unweighted part.

        Raises:
            NonFiniteGradientError: if rows of weight zero are nan.
        """
        if self._numbers is None and self._even == 1 and not self._foreign:
            return part
        if isinstance(part, Factors):
            return replace(
                part,
                layout=self._layout(part.layout),
                arrangement=self.arrangement,
                cotangents=tuple([self._cotangent(b, part.layout) for b in part.cotangents]),
            )
        rows = part.rows() if self._numbers is None else part.rows()[self.kept]
        weights = self._own.to(rows.device, rows.dtype)
        return Rows(part.path, 0, rows / weights.reshape(-1, *[1] * (rows.ndim - 1)))

    def _layout(self, layout: Layout) -> Layout:
        if self._numbers is None:
            return layout
        if id(layout) not in self._layouts:
            numbers = self._numbers.to(layout.owners.device)
            owners = torch.where(layout.owners < 0, NOBODY, numbers[layout.owners.clamp(min=0)])
            fewer = Layout(self.count, layout.dims, owners, device=owners.device)
            self._layouts[id(layout)] = layout, fewer
        return self._layouts[id(layout)][1]

    def _cotangent(self, cotangent: Tensor, layout: Layout) -> Tensor:
        key = id(cotangent), id(layout)
        if key not in self._cotangents:  # a weight and its bias share it
            self._cotangents[key] = cotangent, self._divided(cotangent, layout)
        return self._cotangents[key][1]

    def _divided(self, cotangent: Tensor, layout: Layout) -> Tensor:
        if self._numbers is not None and self._layout(layout).has_strays(cotangent):
            raise NonFiniteGradientError(
                "Some rows have a cotangent of zero, but gradients that are nan or infinite: zero "
                "times these is nan, for other rows too.\n"
                "Take the rows out before the loss, by indexing instead of multiplying with a mask."
            )
        if self._even == 1:
            return cotangent.clone() if memory_of(cotangent) in self._foreign else cotangent
        if self._even is not None:
            return wide(cotangent) / self._even
        whole = wide(cotangent)
        inverse = torch.where(self.kept, self._weights, 1).double().reciprocal()
        if bool((inverse.abs() > torch.finfo(whole.dtype).max).any()):  # from a tiny weight
            return layout.weigh(whole.double(), inverse).to(whole.dtype)
        return layout.weigh(whole, inverse)
