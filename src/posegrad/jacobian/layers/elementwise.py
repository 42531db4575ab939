"""Parameters that are added to, or multiplied with, every row alike: biases and scales."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self, final

import torch
from torch import Tensor

from posegrad.jacobian._form import ClosedForm, Factor, Side
from posegrad.jacobian._layout import Layout
from posegrad.jacobian._products import Products
from posegrad.jacobian._record import record

__all__ = ["Broadcast", "Elementwise"]


@record
class Broadcast(ClosedForm):
    r"""A parameter :math:`\theta` that is broadcast over Y and acts element by element.

    .. math::
        \frac{\partial \hat y_i}{\partial \theta} = \sum_{r \in R_i} b_r \circ
        \frac{\partial y_r}{\partial \theta}

    summed over every dimension along which :math:`\theta` was repeated.

    Args:
        aligned: The parameter's shape against Y's, with a 1 where it was repeated.
    """

    aligned: torch.Size

    has_small_rows = True

    @abstractmethod
    def contribution(self, cotangent: Tensor) -> Tensor:
        """The cotangent times the derivative of each element of Y, in the shape of Y."""

    def accepts(self, cotangent: torch.Size, layout: Layout) -> bool:
        return all(self.aligned[dim] == 1 for dim in layout.dims)

    def vjp(self, cotangent: Tensor) -> Tensor:
        parts = self.contribution(cotangent)
        repeated = parts.ndim - len(self.shape)
        if repeated and parts.shape[repeated:] == self.aligned[repeated:] == self.shape:
            return parts.sum(tuple(range(repeated)))
        return parts.sum_to_size(self.aligned).reshape(self.shape)

    def jvp(self, direction: Tensor, shape: torch.Size) -> Tensor:
        return self.moved(direction.reshape(self.aligned))

    @abstractmethod
    def moved(self, direction: Tensor) -> Tensor:
        """The derivative of each element of Y times a direction in the shape `aligned`."""

    def rows(self, cotangent: Tensor, layout: Layout) -> Tensor:
        parts = self.contribution(cotangent)
        summed = [d for d, n in enumerate(self.aligned) if n == 1 and d not in layout.dims]
        parts = parts.sum(summed, keepdim=True) if summed else parts
        return layout.sum(layout.front(parts)).reshape(layout.count, *self.shape)


@final
@record
class Elementwise(Broadcast):
    """A bias (factor 1), a difference (factor -1), a scale (the factor is the other operand).

    Args:
        factor: The derivative of Y: a number, or a tensor that broadcasts against Y.
        stops: Where Y does not depend on the parameter; even infinite cotangents give zero there.
    """

    factor: Factor | float
    stops: Factor | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """For a bias of features, all dimensions but the last; it shares a weight's cotangent."""
        is_bias = isinstance(self.factor, float) and self.aligned[-1:] == self.shape
        last = len(self.aligned) - 1
        return tuple(range(last)) if is_bias and self.aligned[:last].numel() == 1 else ()

    @property
    def fixed(self) -> tuple[Any, ...]:
        return self.shape, self.factor

    def of_positions(self, factors: Sequence[Tensor]) -> Self:
        return replace(self, aligned=torch.Size([1, *self.shape]))

    def prefers_pairs(self, cotangent: torch.Size, layout: Layout, components: int) -> bool:
        """For a bias with one row per pose: its rows are the cotangent."""
        plain = self.factor == 1 and layout.is_one_each and len(self.shape) == 1
        return plain and cotangent == (layout.count, *self.shape)

    def squares(self, cotangent: Tensor, layout: Layout, products: Products) -> Tensor | None:
        plain = self.prefers_pairs(cotangent.shape, layout, 1)
        return products.squares(cotangent) if plain else None

    def inner(self, first: Tensor, second: Tensor, layout: Layout, products: Products) -> Tensor:
        return products.of(first, second)

    def across(self, own: Side, other: Self, its: Side, products: Products) -> Tensor | None:
        plain = self.prefers_pairs(own.cotangent.shape, own.layout, 1)
        plain = plain and other.prefers_pairs(its.cotangent.shape, its.layout, 1)
        return products.of(own.cotangent, its.cotangent) if plain else None

    def combine(self, cotangent: Tensor, layout: Layout, weights: Tensor) -> Tensor | None:
        plain = self.prefers_pairs(cotangent.shape, layout, 1)
        return weights.to(cotangent) @ cotangent if plain else None

    def contribution(self, cotangent: Tensor) -> Tensor:
        if isinstance(self.factor, Factor):
            parts = cotangent * self.factor.value.to(cotangent.dtype)
            return parts if self.stops is None else parts.masked_fill(self.stops.value, 0)
        return cotangent if self.factor == 1 else cotangent * self.factor

    def moved(self, direction: Tensor) -> Tensor:
        return self.contribution(direction)
