"""The precision that gradients are computed in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact", "is_cast", "no_autocast", "wide"]

P = ParamSpec("P")
T = TypeVar("T")


@cache
def _kinds() -> tuple[str, ...]:
    """The kinds of device that this machine has."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def is_cast() -> bool:
    """Whether autocast is on, for the CPU or for an accelerator."""
    return any(map(torch.is_autocast_enabled, _kinds()))


@contextmanager
def no_autocast() -> Iterator[None]:
    """Turns autocast off: products of gradients stay in the precision they have."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _kinds()):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def exact(method: Callable[P, T]) -> Callable[P, T]:
    """A method that multiplies gradients: nothing is cast meanwhile, and no graph is made."""

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
    """Half precisions as float32: sums over poses are never taken in less."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
