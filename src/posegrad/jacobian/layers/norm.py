"""The scale of a layer, group or batch norm; also in the backward of a layer norm."""

from typing import final

from torch import Tensor

from posegrad.jacobian._form import Factor
from posegrad.jacobian._record import record
from posegrad.jacobian.layers.elementwise import Broadcast

__all__ = ["NormScale", "NormScaleBackward"]


@final
@record
class NormScale(Broadcast):
    r"""The scale of :math:`y = \gamma \circ (x - \mu)\,\rho + \beta`, from the saved statistics.

    Args:
        input: x.
        mean: The means, with a 1 for each normalised dimension. They are held fixed: how they
            depend on other parameters is in those parameters' cotangents.
        inverse_deviation: The inverse deviations, held fixed too.
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

    def moved(self, direction: Tensor) -> Tensor:
        return self.contribution(direction)


@final
@record
class NormScaleBackward(Broadcast):
    r"""The scale in the backward of a layer norm, as in models that compute forces.

    With :math:`\hat x = (x - \mu)\,\rho` and means over the normalised dimensions, that backward is

    .. math::
        y = \rho\, P (\gamma \circ g), \qquad
        P v = v - \overline{v} - \hat x\, \overline{\hat x \circ v} .

    P is symmetric, so a cotangent c gives :math:`\gamma` the gradient
    :math:`g \circ \rho\, P c`.

    Args:
        gradient: g, the gradient that came to the layer.
        input: x.
        mean: The means.
        inverse_deviation: The inverse deviations.
    """

    gradient: Factor
    input: Factor
    mean: Factor
    inverse_deviation: Factor

    def contribution(self, cotangent: Tensor) -> Tensor:
        return self._projected(cotangent).mul_(self.gradient.like(cotangent))

    def moved(self, direction: Tensor) -> Tensor:
        return self._projected(self.gradient.like(direction) * direction)

    def _projected(self, values: Tensor) -> Tensor:
        r""":math:`\rho\, P v`, as a tensor of its own."""
        x, mean, rho = (
            factor.like(values) for factor in (self.input, self.mean, self.inverse_deviation)
        )
        dims = tuple(range(-len(self.shape), 0))
        x = (x - mean).mul_(rho)
        along = (x * values).mean(dims, keepdim=True)
        moved = values - values.mean(dims, keepdim=True) - x.mul_(along)
        return moved.mul_(rho)
