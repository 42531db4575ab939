"""What rules that shorten the poses' gradients have in common: noise, and when it is drawn."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posegrad._warn import warn
from posegrad.combination._checks import positive
from posegrad.errors import PosesMixError, ShapeMismatchError, listed
from posegrad.weighting._base import Jacobian, Step, Weighting, check_finite

__all__ = ["Clipping", "finite_norms"]


class Clipping(Weighting):
    """A rule under which no pose moves the parameters by more than a known length.

    Args:
        noise_multiplier: The noise's standard deviation in units of that length; 0 for none.
        generator: Where the noise is drawn from; needed if there is any.

    Raises:
        ValueError: if `noise_multiplier` is not zero or more, or noise is wanted without a
            generator.
    """

    def __init__(self, noise_multiplier: float, generator: torch.Generator | None) -> None:
        super().__init__()
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
    @abstractmethod
    def greatest(self) -> float:
        """The greatest length by which one pose can move all parameters together."""

    @abstractmethod
    def clipped(self, jacobian: Jacobian) -> Step:
        """The sum of the shortened gradients, of every parameter, and the weights."""

    @property
    def has_noise(self) -> bool:
        """Whether there is any."""
        return self.noise_multiplier != 0

    def last(self, is_last: bool) -> None:
        """Says whether the next gradients end an optimizer step; only those get noise.

        Args:
            is_last: False for the micro-batches before the last one. Also False on all ranks but
                one, where each rank has a rule of its own and DistributedDataParallel averages
                their gradients. It holds until the next call, so a step without True has no noise.
        """
        self._is_last = is_last

    def step(self, jacobian: Jacobian) -> Step:
        used, mixed = [*jacobian.used], [*jacobian.mixed]  # read before rows are released
        if not self.has_noise:
            if not jacobian.predictions.ndim:
                warn(_REDUCED)
            gradients, weights = self.clipped(jacobian)
            return Step({name: gradients[name] for name in used}, weights)
        _check_one_row_each(jacobian)
        noise = self.noise_multiplier * self.greatest
        gradients, weights = self.clipped(jacobian)
        _check_apart(mixed)
        if self._is_last:
            gradients = {n: g + self._normal(g.shape, noise).to(g) for n, g in gradients.items()}
        return Step(gradients, weights)

    def _normal(self, shape: torch.Size, deviation: float) -> Tensor:
        assert self.generator is not None
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return deviation * drawn

    def get_extra_state(self) -> dict[str, Any]:
        """What a `state_dict` holds of the rule, beside its parameters."""
        generator = self.generator
        return {} if generator is None else {"generator": generator.get_state()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"])

    def _of_noise(self) -> str:
        """The noise, for a representation."""
        pending = "" if self._is_last else ", not the last of its step"
        return f"noise_multiplier={self.noise_multiplier:g}{pending}"


_REDUCED = (
    "The output is a single number, like a loss that was reduced over its poses: clipping shortens "
    "the gradient of that number, not that of each pose.\n"
    "Pass one loss for each pose, [m], with reduction='none'; or the loss of a single pose as [1]."
)


def finite_norms(jacobian: Jacobian) -> Tensor:
    """The norms of the rows, in the output's shape.

    Raises:
        NonFiniteGradientError: if one is nan or infinite.
    """
    norms = jacobian.norms()
    check_finite(norms.reshape(-1))
    return norms


def _check_one_row_each(jacobian: Jacobian) -> None:
    """Refuses an output in which a pose may have several rows, or none of its own."""
    shape = list(jacobian.predictions.shape)
    if len(shape) != 1:
        raise ShapeMismatchError(
            f"The output has shape {shape}, and its numbers are shortened each by itself: a pose "
            f"with none or several of its own could move the parameters by more than max_norm, "
            f"and the noise would not hide it.\nReduce it to one loss for each pose, [m]."
        )


def _check_apart(mixed: Sequence[str]) -> None:
    """Refuses rows that other poses move too, so that noise hides no pose."""
    if mixed:
        raise PosesMixError(
            f"Poses may influence each other on their way from {listed(mixed)}: if one pose "
            f"moves the rows of others too, shortening its own row bounds nothing, and the noise "
            f"does not hide it. The step would not be private.\n"
            f"Use GroupNorm or LayerNorm in place of batch statistics, and no mean over the batch."
        )
