"""Boltzmann average of the predictions."""

from typing import final

import torch
from torch import Tensor

from posegrad.combination._base import Combination
from posegrad.combination._checks import number, positive
from posegrad.combination._online import BoltzmannForm, OnlineForm

__all__ = ["Boltzmann"]


@final
class Boltzmann(Combination):
    r"""Thermal average of the per-pose predictions.

    .. math::
        \hat y = \sum_i p_i \hat y_i, \qquad p_i = \operatorname{softmax}_i(-\hat y_i / kT), \qquad
        w_i = p_i \left(1 + \frac{\hat y - \hat y_i}{kT}\right)

    Low predictions dominate as `kT` falls; `Mean` and `Best` are its limits. The gradient's weights
    :math:`w_i` sum to 1 and, unlike the populations :math:`p_i`, may be negative.

    Args:
        kT: Thermal energy, in the unit of the predictions (0.593 for kcal/mol at 298 K). Positive
            and finite. A tensor may be trainable (`nn.Parameter`) or annealed in place.

    Shape:
        predictions `[m, ...]` to `[...]`.

    Raises:
        ValueError: if `kT` is not one positive finite number.

    Note:
        Streams with two accumulators of parameter size. Time: m forwards, m backwards.

    Example:
        >>> Boltzmann(kT=0.593)(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-8.8429)
    """

    kT: float | Tensor

    def __init__(self, kT: float | Tensor) -> None:
        super().__init__()
        self._hold("kT", positive("kT", kT))

    def forward(self, predictions: Tensor) -> Tensor:
        # The minimum is subtracted before dividing, for the reason given in `Max`.
        low = predictions.detach().amin(dim=0)
        populations = torch.softmax((low - predictions) / self.kT, dim=0)  # [m, ...]
        return (populations * predictions).sum(dim=0)

    def online(self) -> OnlineForm | None:
        if isinstance(self.kT, Tensor) and self.kT.requires_grad:
            return None  # the gradient with respect to kT needs all predictions
        return BoltzmannForm(kT=number(self.kT))

    def extra_repr(self) -> str:
        return f"kT={number(self.kT):g}"
