"""The way back from a tensor that was computed from a parameter."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._record import record

__all__ = ["Pull"]

_BASE, _DIGITS = 256, 8  # whole numbers that every dtype holds, and how many digits suffice


@final
@record
class Pull:
    """Pulls gradients of a tensor that was computed from a parameter back to the parameter.

    Args:
        back: From gradients `[N, ...]` of the tensor to those of the parameter; linear.
        keeps: Whether it only reorders numbers, so that inner products stay.
    """

    back: Callable[[Tensor], Tensor]
    keeps: bool

    def places(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """The place of each number of the tensor `shape` in the flattened parameter, `[*shape]`.

        None if a number of the parameter occurs in the tensor more than once, or in a sum.

        `back` is given ones, which count how often each number occurs, and then the digits of each
        place in the tensor: as whole numbers, they arrive exactly where they belong.
        """
        count = shape.numel()
        numbers = torch.arange(count, device=device)
        digits = [(numbers // _BASE**i) % _BASE for i in range(_DIGITS) if _BASE**i <= count]
        shown = torch.stack([torch.ones_like(numbers), *digits]).to(torch.float32)
        times, *found = self.back(shown.reshape(-1, *shape)).flatten(1).double().round().long()
        (places,) = times.nonzero(as_tuple=True)
        if len(places) != count or bool((times[places] != 1).any()):
            return None
        sources = sum(digit[places] * _BASE**i for i, digit in enumerate(found))
        assert isinstance(sources, Tensor)
        return torch.empty_like(places).index_copy_(0, sources, places).reshape(shape)
