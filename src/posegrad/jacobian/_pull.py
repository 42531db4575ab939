"""From a tensor that was computed from a parameter back to the parameter."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._record import record

__all__ = ["Pull"]

_BASE, _DIGITS = 256, 8  # the whole numbers that every dtype holds, and enough digits of them


@final
@record
class Pull:
    """From a tensor that was computed from the parameter to the parameter.

    Args:
        back: From gradients `[N, ...]` of the tensor to those of the parameter; linear.
        keeps: Whether it only puts numbers in another order, so that inner products stay.
    """

    back: Callable[[Tensor], Tensor]
    keeps: bool

    def places(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Where each number of the tensor `shape` lies in the flattened parameter, `[*shape]`.

        None if a number of the parameter stands in the tensor more than once, or in a sum.

        `back` is shown ones, which count how often a number stands there, and the digits of each
        place of the tensor: gradients that are whole numbers arrive where they belong, exactly.
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
