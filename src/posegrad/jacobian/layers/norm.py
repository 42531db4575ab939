"""The scale of a normalisation: layer, group, batch."""

from typing import final

from torch import Tensor

from posegrad.jacobian._form import Factor
from posegrad.jacobian._record import record
from posegrad.jacobian.layers.elementwise import Broadcast

__all__ = ["NormScale"]


@final
@record
class NormScale(Broadcast):
    r"""The scale of :math:`y = \gamma \circ (x - \mu)\,\rho + \beta`, from the saved statistics.

    Args:
        input: x.
        mean: The means, with a 1 for each normalised dimension. They are held fixed: how they
            depend on other parameters is in those parameters' cotangents.
        inverse_deviation: The inverse deviations, likewise.
    """

    input: Factor
    mean: Factor
    inverse_deviation: Factor

    def contribution(self, cotangent: Tensor) -> Tensor:
        x, mean, rho = (
            factor.value.to(cotangent.dtype)
            for factor in (self.input, self.mean, self.inverse_deviation)
        )
        return (x - mean).mul_(rho).mul_(cotangent)
