"""The only place that uses names PyTorch does not promise to keep."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "StorageWeakRef",
    "TorchDispatchMode",
    "leaf_hooks_off",
    "no_autocast",
    "tree_leaves",
]


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Turns autocast off for a backward: its operators follow the dtypes of the forward."""
    kinds = [kind for kind in {"cpu", device_type} if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def leaf_hooks_off(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Keeps `Tensor.register_hook` hooks of leaves from running.

    They would run for every `autograd.grad` that asks for the leaf, and once more when the sum is
    delivered; plain autograd runs them once, on the sum.
    """
    hooks = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    held = [dict(table) for table in hooks]
    for table in hooks:
        table.clear()
    try:
        yield
    finally:
        for table, functions in zip(hooks, held, strict=True):
            table.update(functions)
