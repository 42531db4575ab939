r"""Weights that separate, so that poses can be combined while they stream by.

A rule streams when each weight is a product of what the pose alone knows and what only the whole
group knows:

.. math::
    w_i = \sum_{k=1}^{K} a_k \, \varphi_k(\hat y_i; L)

Then :math:`\sum_i w_i g_i = \sum_k a_k S_k` with the running sums
:math:`S_k = \sum_i \varphi_k(\hat y_i; L)\, g_i`, and no per-pose gradient :math:`g_i` has to be
kept. Features are exponentials, so they are measured against a running level :math:`L` (as in
online softmax); when a new pose raises it by :math:`\delta`, the sums are re-based by a small
lower-triangular matrix, :math:`\varphi(\cdot; L + \delta) = T(\delta)\, \varphi(\cdot; L)`.

All of this is arithmetic on a few numbers. The schedule does it on the host in float64.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

__all__ = ["BoltzmannForm", "ConstantForm", "LogSumExpForm", "OnlineForm"]

# From this scale on (1/kT, per unit of the prediction) a rule is sharp: most weights are exact
# zeros, and scoring all poses before differentiating any is cheaper than streaming.
SHARP = 100.0


class OnlineForm(ABC):
    r"""The separated weights of a rule that acts on each trailing component by itself.

    .. math::
        w_i = \sum_{k=1}^{K} a_k \, \varphi_k(\hat y_i; L)

    Law: `(coefficients * features).sum(0)` are the rule's weights, for any order and chunking of
    the predictions and any level L at least as high as theirs.

    Note:
        Memory under `stream`: K sums of parameter size. All else is a few numbers for each pose, in
        float64 on the host.

    Example:
        >>> form, y = Boltzmann(kT=0.593).online(), torch.tensor([-9.0, -8.0, -4.0])
        >>> level = form.level(y)
        >>> (form.coefficients(y, level) * form.features(y, level)).sum(0)
        tensor([ 1.0671, -0.0658, -0.0013])
    """

    count: int
    """K, the number of running sums of parameter size."""

    soft: bool
    """Whether many poses keep a weight that is not exactly zero."""

    @abstractmethod
    def level(self, predictions: Tensor) -> Tensor:
        """The level of predictions `[c, ...]`, `[...]`; levels join by their maximum."""

    @abstractmethod
    def features(self, predictions: Tensor, level: Tensor) -> Tensor:
        """The features `[K, c, ...]` of predictions `[c, ...]` at a level `[...]`."""

    @abstractmethod
    def transfer(self, rise: Tensor) -> Tensor:
        """Lower-triangular `[K, K, ...]` that re-bases features to a level higher by `rise`."""

    @abstractmethod
    def coefficients(self, predictions: Tensor, level: Tensor) -> Tensor:
        """The group's factors `[K, 1, ...]`, from all predictions `[m, ...]` and their level."""


@final
class ConstantForm(OnlineForm):
    """Weights that do not look at the predictions: 1/m each, or 1 each."""

    count = 1
    soft = True

    def __init__(self, *, average: bool) -> None:
        self.average = average

    def level(self, predictions: Tensor) -> Tensor:
        return torch.zeros_like(predictions[0])

    def features(self, predictions: Tensor, level: Tensor) -> Tensor:
        return torch.ones_like(predictions)[None]

    def transfer(self, rise: Tensor) -> Tensor:
        return torch.ones_like(rise)[None, None]

    def coefficients(self, predictions: Tensor, level: Tensor) -> Tensor:
        factor = 1 / len(predictions) if self.average else 1.0
        return torch.full_like(level, factor)[None, None]


@final
class LogSumExpForm(OnlineForm):
    r"""Softmax weights :math:`e^{t (n \hat y_i - L)} / \sum_j e^{t (n \hat y_j - L)}`.

    n is +1 for a smooth maximum and -1 for a smooth minimum; L is the running maximum of
    :math:`n \hat y`, subtracted *before* scaling so that a large t does not magnify its rounding.
    """

    count = 1

    def __init__(self, *, sign: int, scale: float) -> None:
        self.sign = sign
        self.scale = scale
        self.soft = scale < SHARP

    def level(self, predictions: Tensor) -> Tensor:
        return (self.sign * predictions).amax(dim=0)

    def features(self, predictions: Tensor, level: Tensor) -> Tensor:
        return torch.exp(self.scale * (self.sign * predictions - level))[None]

    def transfer(self, rise: Tensor) -> Tensor:
        return torch.exp(-self.scale * rise)[None, None]

    def coefficients(self, predictions: Tensor, level: Tensor) -> Tensor:
        return 1 / self.features(predictions, level).sum(dim=1, keepdim=True)


@final
class BoltzmannForm(OnlineForm):
    r"""The gradient weights of a thermal average.

    With :math:`p_i = e^{u_i} / Z`, :math:`u_i = (L - \hat y_i)/kT`, L the running *minimum* and
    :math:`Z = \sum_j e^{u_j}`, differentiating :math:`\hat y = \sum_i p_i \hat y_i` gives

    .. math::
        \frac{\partial \hat y}{\partial \hat y_i}
            = p_i \left(1 + \frac{\hat y - \hat y_i}{kT}\right)
            = \frac{1}{Z}\left[(1 - \langle u \rangle)\, e^{u_i} + u_i e^{u_i}\right],
        \qquad \langle u \rangle = \sum_j p_j u_j ,

    because :math:`(\hat y - L)/kT = -\langle u \rangle`. So :math:`\varphi = (e^u, u e^u)`, and a
    level higher by :math:`\delta` (in kT) means :math:`u' = u - \delta`:

    .. math::
        T(\delta) = e^{-\delta} \begin{pmatrix} 1 & 0 \\ -\delta & 1 \end{pmatrix} .
    """

    count = 2

    def __init__(self, *, kT: float) -> None:
        self.kT = kT
        self.soft = 1 / kT < SHARP

    def level(self, predictions: Tensor) -> Tensor:
        return (-predictions).amax(dim=0)

    def features(self, predictions: Tensor, level: Tensor) -> Tensor:
        u = (-predictions - level) / self.kT  # [c, ...], at most 0
        return torch.stack([torch.exp(u), _times_exp(u)])

    def transfer(self, rise: Tensor) -> Tensor:
        fall = torch.exp(-rise / self.kT)
        top = torch.stack([fall, torch.zeros_like(fall)])
        return torch.stack([top, torch.stack([_times_exp(-rise / self.kT), fall])])

    def coefficients(self, predictions: Tensor, level: Tensor) -> Tensor:
        z, first_moment = self.features(predictions, level).sum(dim=1)
        return torch.stack([(1 - first_moment / z) / z, 1 / z])[:, None]


def _times_exp(u: Tensor) -> Tensor:
    """Computes u e^u for u <= 0, with the limit 0 where e^u underflows (and u may be -inf)."""
    e = torch.exp(u)
    return torch.where(e == 0, e, u * e)
