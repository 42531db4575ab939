"""Weights from the predictions, turned away from conflicts between poses."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from posegrad.combination._base import Rule
from posegrad.weighting._base import Weighting
from posegrad.weighting._rules import OfPredictions

__all__ = ["Projected"]


@final
class Projected(Weighting):
    r"""The gradient of a combination rule, projected onto the dual cone of the poses' gradients.

    A rule h gives the gradient :math:`g = w_0^\top J`, :math:`w_0 = \partial h / \partial \hat y`.
    A step along it may raise some poses' predictions while it lowers others. Projected onto the
    cone of steps that agree with every pose,

    .. math::
        w^\top J = \operatorname*{argmin}_{x:\; J x \ge 0} \lVert x - w_0^\top J \rVert ,

    which TorchJD's `DualProjWeighting` solves for a preference :math:`w_0`; `UPGradWeighting`
    projects each :math:`w_{0,i} g_i` by itself. Poses that h does not look at constrain the step
    all the same.

    Args:
        rule: h, a combination rule or a function of the predictions `[M]`.
        weighting: Called with `pref_vector=` :math:`w_0` in every step; it gives a rule from a
            Gramian to weights. TorchJD's class, or one with options by `functools.partial`.

    Shape:
        gramian `[M, M]` and predictions `[M]` to weights `[M]`.

    Raises:
        TypeError: if `weighting` is an instance.

    Note:
        Time and memory: the Gramian, and what `weighting` takes: a quadratic program in M weights.

    References:
        Lopez-Paz, Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017, for the
        projection; Quinton, Rey, "Jacobian descent for multi-objective optimization" (2024).

    Example:
        >>> from torchjd.aggregation import DualProjWeighting
        >>> gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> rule = Projected(Min(scale=5.0), DualProjWeighting)
        >>> rule(gramian, torch.tensor([-9.0, -4.0]))
        tensor([1.0000, 0.4999])
    """

    def __init__(
        self, rule: Rule, weighting: Callable[..., Callable[[Tensor], Tensor]] | type[nn.Module]
    ) -> None:
        super().__init__()
        if isinstance(weighting, nn.Module) or not callable(weighting):
            raise TypeError(
                f"weighting is {weighting!r}, but it is called with the preference in every step.\n"
                f"Pass the class, or functools.partial(the class, its options)."
            )
        self.preference = OfPredictions(rule)
        self.weighting = weighting

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        preferred = self.preference.weights(predictions).to(gramian)
        with torch.no_grad():
            weights: Tensor = self.weighting(pref_vector=preferred)(gramian)
        return weights
