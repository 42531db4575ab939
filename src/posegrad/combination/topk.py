"""Mean of the few best predictions."""

from typing import final

from torch import Tensor

from posegrad.combination._base import Combination
from posegrad.combination._checks import whole

__all__ = ["TopK"]


@final
class TopK(Combination):
    r"""Mean of the k lowest (or highest) per-pose predictions.

    .. math::
        \hat y = \frac{1}{k} \sum_{i \in \text{best } k} \hat y_i, \qquad
        w_i = \frac{[\, i \text{ is among the best } k \,]}{k}

    A group of fewer than k poses is averaged whole.

    Args:
        k: How many poses count; at least 1.
        largest: Take the highest instead; for scores where high is good.

    Shape:
        predictions `[m, ...]` to `[...]`.

    Raises:
        ValueError: if `k` is not a whole number of at least 1.

    Note:
        k poses are differentiated. Time: m forwards, then k forwards and k backwards.

    Example:
        >>> TopK(2)(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-8.5000)
    """

    def __init__(self, k: int, *, largest: bool = False) -> None:
        super().__init__()
        self.k = whole("k", k)
        self.largest = largest

    def forward(self, predictions: Tensor) -> Tensor:
        k = min(self.k, len(predictions))
        return predictions.topk(k, dim=0, largest=self.largest).values.mean(dim=0)

    def counting(self) -> int:
        """The k best."""
        return self.k

    def extra_repr(self) -> str:
        return f"k={self.k}, largest={self.largest}"
