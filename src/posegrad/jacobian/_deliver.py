"""Gradients that were computed elsewhere, handed to parameters as a backward would."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["deliver"]


def deliver(parameters: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Adds gradients to the `.grad` of parameters; their hooks run, once.

    `torch.autograd.backward(parameters, gradients)` would do the same and copy every one, because
    its caller still holds them. A node's backward lets go of what it returns, and autograd keeps
    that itself where there is no `.grad` yet.

    Args:
        parameters: Leaves that require grad.
        gradients: One for each, of its shape, dtype and device; the list is emptied.
    """
    if parameters:
        with torch.enable_grad():
            end = _Delivery.apply(gradients, *parameters)  # type: ignore[no-untyped-call]
        torch.autograd.backward(end)


class _Delivery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = (None, *ctx.gradients)
        ctx.gradients.clear()
        return found
