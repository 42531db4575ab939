"""Backwards that must not touch the user's gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from posegrad.errors import ReentrantCheckpointError

__all__ = ["grad_set_aside"]


@contextmanager
def grad_set_aside(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses a backward that deposits gradients by itself, before there are weights for them.

    Raises:
        ReentrantCheckpointError: if one did; every `.grad` is as it was.
    """
    held = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        yield
    finally:
        written = [name for name, p in parameters.items() if p.grad is not None]
        for name, p in parameters.items():
            p.grad = held[name]
    if written:
        raise ReentrantCheckpointError(
            f"A custom autograd function inside the model calls backward() and deposits "
            f"gradients by itself (into {written[0]}), before their weights are known.\n"
            f"Let the function return its gradients; combine() can also use schedule='retain'."
        )
