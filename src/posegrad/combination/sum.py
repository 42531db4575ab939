"""Sum of the predictions."""

from typing import final

from torch import Tensor

from posegrad.combination._base import Combination
from posegrad.combination._online import ConstantForm, OnlineForm

__all__ = ["Sum"]


@final
class Sum(Combination):
    r"""Sum of the per-pose predictions, for parts of one whole rather than views of it.

    .. math::
        \hat y = \sum_{i=1}^{m} \hat y_i, \qquad w_i = 1

    Shape:
        predictions `[m, ...]` to `[...]`.

    Note:
        Streams with one accumulator of parameter size. Time: m forwards, m backwards. Not shift
        equivariant: adding c to every prediction adds m c.

    Example:
        >>> Sum()(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-21.)
    """

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.sum(dim=0)

    def online(self) -> OnlineForm:
        return ConstantForm(average=False)
