"""Median of each parameter's gradients."""

from typing import final

from torch import Tensor

from posegrad.weighting._base import Aggregation
from posegrad.weighting._columns import by_columns, in_order

__all__ = ["Median"]


@final
class Median(Aggregation):
    r"""Column by column, the median of the gradients; of two in the middle, their mean.

    .. math::
        g_c = \operatorname{median}_i g_{ic}

    Shape:
        block `[M, ...]` to `[...]`.

    Note:
        Memory: the rows of one parameter. Time: sorting them.

    References:
        Yin et al., "Byzantine-robust distributed learning", ICML 2018, definition 1.

    Example:
        >>> Median()(torch.tensor([[1.0, 0.0], [3.0, 9.0], [100.0, 8.0], [4.0, 2.0]]))
        tensor([3.5000, 5.0000])
    """

    def forward(self, block: Tensor) -> Tensor:
        low, high = (len(block) - 1) // 2, len(block) // 2
        return by_columns(block, lambda x: in_order(x)[low : high + 1].mean(0))
