"""The best prediction alone."""

from typing import final

from torch import Tensor

from posegrad.combination._base import Combination

__all__ = ["Best"]


@final
class Best(Combination):
    r"""Hard minimum (or maximum) of the per-pose predictions.

    .. math::
        \hat y = \min_i \hat y_i, \qquad w_i = [\, i \text{ is the best} \,]

    Poses tied for best share the weight equally, so that the order of the poses does not matter.

    Args:
        largest: Take the maximum instead; for scores where high is good.

    Shape:
        predictions `[m, ...]` to `[...]`.

    Note:
        One pose is differentiated. Time: m forwards, then one forward and one backward.

    Example:
        >>> Best()(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-9.)
    """

    def __init__(self, *, largest: bool = False) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, predictions: Tensor) -> Tensor:
        return predictions.amax(dim=0) if self.largest else predictions.amin(dim=0)

    def counting(self) -> int:
        """The best one, unless others are as good."""
        return 1

    def extra_repr(self) -> str:
        return f"largest={self.largest}"
