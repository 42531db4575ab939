"""Calls one operator's backward by itself, or a function inside a backward of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import device_of, dtype_of, is_python, shape_of

__all__ = ["apply_node", "in_backward"]


def apply_node(node: Node, cotangents: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One operator's vector-Jacobian product: a gradient for each of its arguments.

    No hook runs, and no other operator.
    """
    if not is_python(node):
        result = node(*cotangents)  # type: ignore[operator]
        return result if isinstance(result, tuple) else (result,)
    # A Python function returns something for every argument, tensor or not, but its node has edges
    # for tensors only. Those that need a gradient stand in the same order in both.
    places = zip(shape_of(node), dtype_of(node), strict=True)
    filled = [
        torch.zeros(shape, dtype=dtype, device=device_of(node)) if b is None else b
        for b, (shape, dtype) in zip(cotangents, places, strict=True)
    ]
    result = node.apply(*filled)  # type: ignore[attr-defined]
    answers = result if isinstance(result, tuple) else (result,)
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]  # type: ignore[attr-defined]
    live = [i for i, (source, _) in enumerate(node.next_functions) if source is not None]
    by_edge = dict(zip(live, needed, strict=True))
    return tuple(
        answers[by_edge[i]] if i in by_edge else None for i in range(len(node.next_functions))
    )


def in_backward(function: Callable[[], None]) -> None:
    """Calls a function inside a backward of its own.

    A checkpoint recomputes its saved tensors once for each backward in which they are read; outside
    of a backward it does so again for each tensor.
    """
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True, device="cpu")
        end = start.clone()
    end.register_hook(lambda _: function())  # type: ignore[no-untyped-call]
    torch.autograd.grad(end, start)
