"""Mean of the predictions."""

from typing import final

from torch import Tensor

from posegrad.combination._base import Combination
from posegrad.combination._online import ConstantForm, OnlineForm

__all__ = ["Mean"]


@final
class Mean(Combination):
    r"""Arithmetic mean of the per-pose predictions.

    .. math::
        \hat y = \frac{1}{m} \sum_{i=1}^{m} \hat y_i, \qquad w_i = \frac{1}{m}

    Shape:
        predictions `[m, ...]` to `[...]`.

    Note:
        Streams with one accumulator of parameter size. Time: m forwards, m backwards.

    References:
        Equations 3 and 4 of mtenn's documentation of its combinations.

    Example:
        >>> Mean()(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-7.)
    """

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.mean(dim=0)

    def online(self) -> OnlineForm:
        return ConstantForm(average=True)
