"""Computing in float64 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["double_precision"]


@contextmanager
def double_precision() -> Iterator[None]:
    """PIGNet2 allocates in the default type; without this its float64 is float32 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
