"""Mean of the gradients where enough of them point the same way."""

from typing import final

import torch
from torch import Tensor

from posegrad.weighting._base import Aggregation
from posegrad.weighting._columns import by_columns

__all__ = ["SignAgreement"]


@final
class SignAgreement(Aggregation):
    r"""Column by column, the mean gradient where the signs agree, and zero elsewhere.

    .. math::
        g_c = \bar g_c \, \Bigl[\, \Bigl| \frac{1}{m} \sum_i \operatorname{sign} g_{ic} \Bigr|
        \ge \tau \,\Bigr]

    Args:
        threshold: :math:`\tau` in [0, 1]; 0 is the mean, 1 asks all poses to agree.

    Shape:
        block `[M, ...]` to `[...]`.

    Raises:
        ValueError: if `threshold` is not in [0, 1].

    Note:
        Memory: the rows of one parameter. TorchJD's `GradDrop` draws at random what is decided by a
        threshold here.

    References:
        Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021, section 2.3.

    Example:
        >>> SignAgreement(0.5)(torch.tensor([[1.0, -3.0], [3.0, 9.0], [2.0, -3.0]]))
        tensor([2., 0.])
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, but it must lie in [0, 1].")
        self.threshold = float(threshold)

    def forward(self, block: Tensor) -> Tensor:
        return by_columns(block, self._agreed)

    def _agreed(self, columns: Tensor) -> Tensor:
        needed = self.threshold * len(columns) - 1e-6  # the product rounds, a sum of signs not
        agree = columns.sign().sum(0, dtype=torch.float32).abs() >= needed  # half cannot count
        mean = columns.mean(0)
        return torch.where(agree, mean, torch.zeros_like(mean))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"
