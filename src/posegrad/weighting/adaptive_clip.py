"""Per-pose clipping whose bound follows a quantile of the norms."""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from posegrad.combination._checks import number, positive
from posegrad.weighting._base import Jacobian, Step
from posegrad.weighting._clipping import Clipping, finite_norms

__all__ = ["AdaptiveClip"]


@final
class AdaptiveClip(Clipping):
    r"""`Clip`, with a bound C that follows a quantile of the gradients' norms.

    .. math::
        C \leftarrow C\, e^{-\eta (\tilde b - q)}, \qquad
        \tilde b = \frac12 + \frac1n \left( \sum_i
        \left( [\lVert g_i \rVert \le C] - \frac12 \right) + \mathcal N(0, \sigma_b^2) \right)

    after each step, so that a share q of the poses keeps its gradient unshortened. The count costs
    privacy too; a pose that comes or goes moves it by a half. So that both together cost what
    `Clip` costs with the noise :math:`\sigma`, the gradient gets noise of
    :math:`(\sigma^{-2} - (2 \sigma_b)^{-2})^{-1/2}` times C.

    Args:
        quantile: q, between 0 and 1.
        max_norm: C before the first step. Positive and finite; 0.1 is usual, as C adapts soon.
        rate: :math:`\eta`.
        noise_multiplier: :math:`\sigma`; 0 for no noise at all.
        count_noise: :math:`\sigma_b`, in poses; more than half of :math:`\sigma`. Default: a
            twentieth of `expected`.
        expected: n, the expected number of poses in an optimizer step; needed with noise, as the
            number that was drawn is not public. Default: how many there are.
        generator: Where noise is drawn from; needed if there is any.

    Attributes:
        max_norm: C as it is now. It is in `state_dict()`, with the generator's state.

    Shape:
        gramian `[M, M]`, of which the diagonal is read; to weights `[M]`.

    Raises:
        ValueError: if an argument is out of its range, or one that noise needs is missing.
        ShapeMismatchError: in backward, if there is noise and the output is not `[m]`.
        PosesMixError: likewise, if poses influence each other.

    Warns:
        UserWarning: without noise, of an output of shape `[]`, as a loss that was reduced has.

    Note:
        As `Clip`. C moves once in an optimizer step, after the gradients that `last` says end it.

    References:
        Andrew et al., "Differentially private learning with adaptive clipping", NeurIPS 2021,
        algorithm 1 and theorem 1.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> rule = AdaptiveClip(quantile=0.5, max_norm=1.0)
        >>> for _ in range(100):
        ...     y = model(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]])).squeeze(1)
        ...     _ = Engine(model).backward(y, rule)
        >>> 0.8 < rule.max_norm < 1.2
        True
    """

    def __init__(
        self,
        quantile: float,
        max_norm: float = 0.1,
        *,
        rate: float = 0.2,
        noise_multiplier: float = 0.0,
        count_noise: float | None = None,
        expected: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(noise_multiplier, generator)
        if not 0 < quantile < 1:
            raise ValueError(f"quantile is {quantile}, but it lies between 0 and 1.")
        self.quantile = float(quantile)
        self.max_norm = number(positive("max_norm", max_norm))
        self.rate = number(positive("rate", rate))
        self.expected = None if expected is None else number(positive("expected", expected))
        self.count_noise = 0.0
        if self.has_noise:
            self.count_noise = _count_noise(self.noise_multiplier, count_noise, self.expected)
        self._unshortened = 0.0
        self._seen = 0
        self._latest = 0.0, 0  # of the gradients that are being made

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return self._shortening(gramian.diagonal().clamp(min=0).sqrt())

    def weights(self, jacobian: Jacobian) -> Tensor:
        return self._shortening(finite_norms(jacobian))

    @property
    def greatest(self) -> float:
        """C; more, where the count has a part of the noise."""
        if not self.has_noise:
            return self.max_norm
        share = self.noise_multiplier / (2 * self.count_noise)
        return self.max_norm / math.sqrt(1 - share**2)

    def clipped(self, jacobian: Jacobian) -> Step:
        norms = finite_norms(jacobian)
        weights = self._shortening(norms)
        gradients = jacobian.combine(weights)
        self._latest = float((norms <= self.max_norm).sum()), norms.numel()
        return Step(gradients, weights)

    def step(self, jacobian: Jacobian) -> Step:
        try:
            step = super().step(jacobian)
        except BaseException:
            if self._is_last:  # the step is lost, and what was counted for it
                self._unshortened, self._seen = 0.0, 0
            raise
        unshortened, seen = self._latest
        self._unshortened += unshortened
        self._seen += seen
        if self._is_last:
            self._follow()
        return step

    def _follow(self) -> None:
        """Moves C by what was counted since it last moved."""
        beyond, of = self._unshortened - self._seen / 2, self.expected or self._seen
        if self.has_noise:
            beyond += float(self._normal(torch.Size(()), self.count_noise))
        if of:
            self.max_norm *= math.exp(-self.rate * (beyond / of + 0.5 - self.quantile))
        self._unshortened, self._seen = 0.0, 0

    def _shortening(self, norms: Tensor) -> Tensor:
        return norms.div(self.max_norm).clamp_(min=1).reciprocal_()

    def get_extra_state(self) -> dict[str, Any]:
        own = {"max_norm": self.max_norm, "counted": (self._unshortened, self._seen)}
        return super().get_extra_state() | own

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        self.max_norm = float(state["max_norm"])
        self._unshortened, self._seen = state["counted"]

    def extra_repr(self) -> str:
        told = f"quantile={self.quantile:g}, max_norm={self.max_norm:g}, rate={self.rate:g}, "
        return told + self._of_noise()


def _count_noise(multiplier: float, given: float | None, expected: float | None) -> float:
    """The noise of the count.

    Raises:
        ValueError: if the number of poses is unknown, or the gradient's noise would have no part.
    """
    if expected is None:
        raise ValueError(
            "There is noise, but expected is not stated: the share of shortened gradients would "
            "be taken of the number of poses drawn, which is not public.\n"
            "Pass expected=, the mean number of poses in an optimizer step."
        )
    noise = expected / 20 if given is None else number(positive("count_noise", given))
    if noise <= multiplier / 2:
        raise ValueError(
            f"count_noise is {noise:g}, but it must be more than half of noise_multiplier, "
            f"{multiplier:g}: the count alone would cost more privacy than the step may.\n"
            f"Pass a larger count_noise=."
        )
    return noise
