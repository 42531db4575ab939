"""Per-pose clipping, with noise a step of DP-SGD."""

from typing import final

import torch
from torch import Tensor

from posegrad.combination._checks import number, positive
from posegrad.errors import ShapeMismatchError
from posegrad.weighting._base import Jacobian, Step, Weighting, check_finite

__all__ = ["Clip"]


@final
class Clip(Weighting):
    r"""The sum of the poses' gradients, each shortened to a greatest length.

    .. math::
        g = \sum_i w_i g_i + z, \qquad w_i = \min\left(1, \frac{C}{\lVert g_i \rVert}\right), \qquad
        z \sim \mathcal N(0, \sigma^2 C^2)

    No pose moves the parameters by more than C. With noise this is a step of DP-SGD: divide by the
    expected number of poses, by the learning rate or in the loss, and leave the accounting to a
    library for it. The noise then also goes to parameters that no pose of this group uses: which
    ones these are may tell. An output `[m, d]` has d gradients a pose, each shortened by itself: to
    bound the pose, reduce them to its one loss. With noise nothing else is taken.

    The noise is that of one optimizer step. Where several gradients are added up for a step, of
    micro-batches or of ranks, `last` says which of them has it.

    Args:
        max_norm: C, the greatest norm of one pose's gradient over all parameters, in units of the
            prediction per parameter. Positive and finite.
        noise_multiplier: :math:`\sigma`; 0 for none.
        generator: Where the noise is drawn from; needed if there is any.

    Shape:
        gramian `[M, M]`, of which the diagonal is read; to weights `[M]`.

    Raises:
        ValueError: if `max_norm` is not positive and finite, `noise_multiplier` not zero or more,
            or noise is wanted without a generator.
        ShapeMismatchError: in backward, if there is noise and the output is not `[m]`.

    Note:
        Needs norms alone, no Gramian. Time: a step with plain backward, and the norms: for layers
        with one row a pose no more than reading their inputs and cotangents.

    References:
        Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1; Goodfellow,
        "Efficient per-example gradient computations" (2015), for the norms.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> y = model(torch.tensor([[3.0, 4.0], [0.3, 0.4]])).squeeze(1)
        >>> Engine(model).backward(y, Clip(max_norm=1.0))
        tensor([0.2000, 1.0000])
        >>> model.weight.grad
        tensor([[0.9000, 1.2000]])
    """

    def __init__(
        self,
        max_norm: float,
        *,
        noise_multiplier: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_norm = number(positive("max_norm", max_norm))
        if noise_multiplier != 0:
            positive("noise_multiplier", noise_multiplier)
            if generator is None:
                raise ValueError(
                    f"noise_multiplier is {noise_multiplier}, but there is no generator to draw "
                    f"the noise from; the global ones are left alone.\n"
                    f"Pass generator=torch.Generator(device).manual_seed(...)."
                )
        self.noise_multiplier = float(noise_multiplier)
        self.generator = generator
        self._is_last = True

    @property
    def has_noise(self) -> bool:
        """Whether there is any."""
        return self.noise_multiplier != 0

    def last(self, is_last: bool) -> None:
        """Says whether the gradients to come end an optimizer step; these alone have the noise.

        Args:
            is_last: False for the micro-batches before the last one, and for all ranks but one
                where each has a rule of its own and DistributedDataParallel averages their
                gradients. It holds until the next call, so a step that never hears True has no
                noise.

        Example:
            >>> model, rule = nn.Linear(2, 1), Clip(1.0, noise_multiplier=0.5,
            ...                                     generator=torch.Generator())
            >>> for micro_batch in range(4):
            ...     rule.last(micro_batch == 3)
            ...     losses = model(torch.randn(8, 2)).square().squeeze(1)
            ...     Engine(model).loss(losses, rule).div(4).backward()
        """
        self._is_last = is_last

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        return self._shortening(gramian.diagonal().clamp(min=0).sqrt())

    def weights(self, jacobian: Jacobian) -> Tensor:
        norms = jacobian.norms()
        check_finite(norms.reshape(-1))
        return self._shortening(norms)

    def step(self, jacobian: Jacobian) -> Step:
        if not self.has_noise:
            return super().step(jacobian)
        if jacobian.predictions.ndim != 1:
            raise ShapeMismatchError(
                f"The output has shape {list(jacobian.predictions.shape)}, and its numbers are "
                f"shortened each by itself: a pose with none or several of its own could move the "
                f"parameters by more than max_norm, unseen by the noise.\n"
                f"Reduce it to one loss for each pose, [m]."
            )
        weights = self.weights(jacobian)
        gradients = jacobian.combine(weights)
        if self._is_last:
            gradients = {name: g + self._noise(g) for name, g in gradients.items()}
        return Step(gradients, weights)

    def _shortening(self, norms: Tensor) -> Tensor:
        return norms.div(self.max_norm).clamp_(min=1).reciprocal_()  # 1 also for a norm of zero

    def _noise(self, gradient: Tensor) -> Tensor:
        assert self.generator is not None
        noise = torch.randn(gradient.shape, generator=self.generator, device=self.generator.device)
        return (self.noise_multiplier * self.max_norm * noise).to(gradient)

    def extra_repr(self) -> str:
        pending = "" if self._is_last else ", not the last of its step"
        return f"max_norm={self.max_norm:g}, noise_multiplier={self.noise_multiplier:g}{pending}"
