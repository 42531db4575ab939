"""A network, a batch and the losses of its poses, as ordinary code writes them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["MAX_NORM", "Losses", "Problem"]

MAX_NORM = 1.0  # that rows are clipped to

Losses = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A network and `m` poses; `losses(network, *inputs)` gives the loss of each, `[m]`.

    Attributes:
        network: Always the same one.
        losses: Calls the network, or whatever is put in its place, and takes the losses.
        inputs: Of all poses together.
        m: How many losses they give.
        is_sliced: Whether pose `i` is item `i` of each input, so that it can be scored alone.
        is_random: Whether a forward draws random numbers.
        has_double: Whether torch has all of its operators in float64.
    """

    network: nn.Module
    losses: Losses
    inputs: tuple[Any, ...]
    m: int
    is_sliced: bool = True
    is_random: bool = False
    has_double: bool = True

    @cached_property
    def weights(self) -> Tensor:
        """Of the weighted gradient, `[m]`: fixed, random, of both signs."""
        return torch.randn(self.m, generator=torch.Generator().manual_seed(1))

    def of(self, network: Any) -> Tensor:
        """The losses by a network that is put in the place of the problem's own."""
        return self.losses(network, *self.inputs)

    def copied(self) -> Self:
        """The same problem with a network of its own."""
        return replace(self, network=copy.deepcopy(self.network))

    def double(self) -> Self:
        """A copy of the problem in float64."""
        inputs = tuple(_doubled(x) for x in self.inputs)
        return replace(self, network=copy.deepcopy(self.network).double(), inputs=inputs)


def _doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
