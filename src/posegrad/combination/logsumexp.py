"""Smooth maximum and minimum of the predictions, by LogSumExp."""

from typing import final

import torch
from torch import Tensor

from posegrad.combination._base import Combination
from posegrad.combination._checks import number, positive
from posegrad.combination._online import LogSumExpForm, OnlineForm

__all__ = ["Max", "Min"]


class _LogSumExp(Combination):
    """What `Max` and `Min` share; they differ in the sign n."""

    sign: int
    scale: float | Tensor

    def __init__(self, scale: float | Tensor = 1000.0) -> None:
        super().__init__()
        self._hold("scale", positive("scale", scale))

    def forward(self, predictions: Tensor) -> Tensor:
        # The extremum is subtracted before scaling: at t = 1000 and |s| = 88, float32 would
        # otherwise lose up to 0.8 % of the normalisation. It is a constant to autograd, because
        # d/ds [max + log(sum exp(t (s - max))) / t] = softmax(t (s - max)) for any constant max.
        s = self.sign * predictions  # [m, ...]
        top = s.detach().amax(dim=0)
        return self.sign * (top + torch.logsumexp(self.scale * (s - top), dim=0) / self.scale)

    def online(self) -> OnlineForm | None:
        if isinstance(self.scale, Tensor) and self.scale.requires_grad:
            return None  # the gradient with respect to the scale needs all predictions
        return LogSumExpForm(sign=self.sign, scale=number(self.scale))

    def extra_repr(self) -> str:
        return f"scale={number(self.scale):g}"


@final
class Max(_LogSumExp):
    r"""Smooth maximum of the per-pose predictions.

    .. math::
        \hat y = \frac{1}{t} \ln \sum_{i=1}^{m} e^{t \hat y_i}, \qquad
        w_i = \operatorname{softmax}_i(t \hat y_i)

    It never falls below the true maximum and exceeds it by at most :math:`\ln(m)/t`.

    Args:
        scale: t, per unit of the predictions (per kT for energies in kT). Positive and finite. A
            tensor may be trainable (`nn.Parameter`) or annealed in place.

    Shape:
        predictions `[m, ...]` to `[...]`.

    Raises:
        ValueError: if `scale` is not one positive finite number.

    Note:
        Below scale 100 it streams with one accumulator of parameter size; above, poses of weight
        exactly zero are never differentiated. Time: m forwards, then a forward and a backward for
        each pose whose weight is not zero.

    References:
        Equations 5 to 9 of mtenn's documentation of its combinations, n = 1.

    Example:
        >>> Max(scale=1.0)(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-3.9753)
    """

    sign = 1


@final
class Min(_LogSumExp):
    r"""Smooth minimum of the per-pose predictions: the best pose, if low energies are good.

    .. math::
        \hat y = -\frac{1}{t} \ln \sum_{i=1}^{m} e^{-t \hat y_i}, \qquad
        w_i = \operatorname{softmax}_i(-t \hat y_i)

    It never exceeds the true minimum and falls below it by at most :math:`\ln(m)/t`. With
    :math:`t = 1/kT` it is the free energy of the group of poses.

    Args:
        scale: t, per unit of the predictions (per kT for energies in kT). Positive and finite. A
            tensor may be trainable (`nn.Parameter`) or annealed in place.

    Shape:
        predictions `[m, ...]` to `[...]`.

    Raises:
        ValueError: if `scale` is not one positive finite number.

    Note:
        Cost as for `Max`. `Min(scale=1000.0)` is the default of mtenn's `MaxCombination`.

    References:
        Equations 5 to 9 of mtenn's documentation of its combinations, n = -1.

    Example:
        >>> Min(scale=1.0)(torch.tensor([-9.0, -8.0, -4.0]))
        tensor(-9.3182)
    """

    sign = -1
