"""Mean of each parameter's gradients without the extreme ones."""

from typing import final

from torch import Tensor

from posegrad.combination._checks import whole
from posegrad.errors import ShapeMismatchError
from posegrad.weighting._base import Aggregation
from posegrad.weighting._columns import by_columns, in_order

__all__ = ["TrimmedMean"]


@final
class TrimmedMean(Aggregation):
    r"""Column by column, the mean of the gradients without the lowest and the highest few.

    .. math::
        g_c = \frac{1}{m - 2 q} \sum_{r=q+1}^{m-q} g_{(r)c}

    with the trim q and the gradients of a column in order, :math:`g_{(1)c} \le \dots \le g_{(m)c}`.
    A few poses whose gradients are wildly off cannot move the parameters far.

    Args:
        trim: How many are left out at either end; at least 1.

    Shape:
        block `[M, ...]` to `[...]`, M > 2 trim.

    Raises:
        ValueError: if `trim` is not a whole number of at least 1.
        ShapeMismatchError: if nothing would be left.

    Note:
        Memory: the rows of one parameter. Time: sorting them.
        `torchjd.aggregation.TrimmedMean` gives the same from the whole matrix.

    References:
        Yin et al., "Byzantine-robust distributed learning", ICML 2018, definition 2.

    Example:
        >>> TrimmedMean(1)(torch.tensor([[1.0, 0.0], [3.0, 9.0], [100.0, 8.0]]))
        tensor([3., 8.])
    """

    def __init__(self, trim: int) -> None:
        super().__init__()
        self.trim = whole("trim", trim)

    def forward(self, block: Tensor) -> Tensor:
        count, trim = len(block), self.trim
        if count <= 2 * trim:
            raise ShapeMismatchError(
                f"TrimmedMean({trim}) leaves out {2 * trim} rows, and there are {count}.\n"
                f"Trim at most {(count - 1) // 2}."
            )
        return by_columns(block, lambda x: in_order(x)[trim : count - trim].mean(0))

    def extra_repr(self) -> str:
        return f"trim={self.trim}"
