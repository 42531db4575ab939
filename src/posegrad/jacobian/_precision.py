"""The precision that gradients are computed in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact", "is_cast", "no_autocast", "wide"]

P = ParamSpec("P")
T = TypeVar("T")


def is_cast(device_type: str = "cuda") -> bool:
    """Whether autocast is on, on the CPU or on a device of another kind."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(device_type)


@contextmanager
def no_autocast(device_type: str = "cuda") -> Iterator[None]:
    """Turns autocast off: products of gradients stay in the precision they have.

    Args:
        device_type: A kind of device besides the CPU.
    """
    kinds = [kind for kind in {"cpu", device_type} if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exact(method: Callable[P, T]) -> Callable[P, T]:
    """A method that multiplies gradients: nothing is cast meanwhile, and no graph is made."""

    @wraps(method)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad():
            if not is_cast():
                return method(*args, **kwargs)
            with no_autocast():
                return method(*args, **kwargs)

    return inner


def wide(tensor: Tensor) -> Tensor:
    """Half precisions as float32: sums over poses are never taken in less."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
