"""The precision in which gradients are computed."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from posegrad._restoring import no_autocast, restoring
from posegrad._threads import device_kinds

__all__ = ["exact", "is_cast", "wide"]

P = ParamSpec("P")
T = TypeVar("T")


def is_cast() -> bool:
    """Whether autocast is on, for the CPU or for an accelerator."""
    return any(map(torch.is_autocast_enabled, device_kinds()))


def exact(method: Callable[P, T]) -> Callable[P, T]:
    """Runs a method that multiplies gradients without autocast and without a graph."""

    @restoring
    @wraps(method)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # torch.no_grad() takes twice as long
        try:
            if not is_cast():
                return method(*args, **kwargs)
            with no_autocast():
                return method(*args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    return inner


def wide(tensor: Tensor) -> Tensor:
    """Half precisions as float32: sums over poses are never less precise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
