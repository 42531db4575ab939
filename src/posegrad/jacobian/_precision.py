"""The precision that gradients are computed in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

__all__ = ["no_autocast", "wide"]


@contextmanager
def no_autocast(device_type: str = "cuda") -> Iterator[None]:
    """Turns autocast off: the operators of a backward follow the dtypes of the forward.

    Args:
        device_type: A kind of device besides the CPU.
    """
    kinds = [kind for kind in {"cpu", device_type} if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def wide(tensor: Tensor) -> Tensor:
    """Half precisions as float32: sums over poses are never taken in less."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
