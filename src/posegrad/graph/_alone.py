"""What is called by itself: one operator's backward, and a backward around a function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from posegrad._torch import device_of, dtype_of, is_python, shape_of

__all__ = ["apply_node", "in_backward"]


def apply_node(node: Node, cotangents: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """One operator's vector-Jacobian product: a gradient for each of its arguments.

    No hook runs, and nothing beyond the operator.
    """
    if not is_python(node):
        result = node(*cotangents)  # type: ignore[operator]
        return result if isinstance(result, tuple) else (result,)
    # A function of Python answers for all its arguments, tensors or not, and its node has edges for
    # the tensors alone; those that need a gradient stand in the same order in both.
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

    Saved tensors of a checkpoint are recomputed once for each backward they are read in; outside
    of any, once for each tensor.
    """
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True, device="cpu")
        end = start.clone()
    end.register_hook(lambda _: function())  # type: ignore[no-untyped-call]
    torch.autograd.grad(end, start)
