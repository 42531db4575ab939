"""Reads, and puts back, what torch's context managers set for a thread."""

from functools import cache
from operator import call
from typing import NamedTuple, final

import torch

from posegrad._torch import mode_stack, multithreading, set_grad, set_multithreading

__all__ = ["ThreadState", "device_kinds", "put_back", "thread_state"]


@cache
def device_kinds() -> tuple[str, ...]:
    """The kinds of device that this machine has."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@final
class ThreadState(NamedTuple):
    """What torch's context managers set for a thread, and leave behind if they are cut short."""

    grad: bool
    multithreading: bool
    casts: list[tuple[str, bool, torch.dtype]]
    cache: bool
    nesting: int
    modes: int


def thread_state() -> ThreadState:
    """The state of this thread, read in a microsecond or two."""
    return ThreadState(
        torch.is_grad_enabled(),
        multithreading(),
        [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_kinds()
        ],
        torch.is_autocast_cache_enabled(),
        _nesting(),
        mode_stack()[0](),
    )


def put_back(state: ThreadState) -> None:
    """Puts this thread back into a state; harmless if nothing has changed."""
    depth, pop = mode_stack()
    while depth() > state.modes:  # default devices are such modes
        pop()
    for kind, enabled, dtype in state.casts:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(state.cache)
    for _ in range(_nesting() - state.nesting):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()  # casts made without a graph carry no gradient
    set_multithreading(state.multithreading)
    set_grad(state.grad)


def _nesting() -> int:
    """How many autocasts this thread is in.

    torch tells the number only when it counts up or down. `map` makes both calls, since Python
    looks for no signal between them.
    """
    up, _ = map(call, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return up - 1
