"""Makes values computed elsewhere differentiable: the one autograd Function of the schedules."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from posegrad._restoring import restoring
from posegrad._torch import in_ddp, in_static_ddp
from posegrad.errors import HigherOrderError
from posegrad.schedule._inputs import Inputs

__all__ = ["Pullback", "attach"]

Gradients = Sequence[Tensor | None]
Pullback = Callable[[Gradients, Gradients], Gradients]
"""From the saved tensors and the cotangents of the values to the gradients of the inputs."""


def attach(
    values: Sequence[Tensor],
    inputs: Inputs,
    pullback: Pullback,
    saved: Gradients = (),
    reached: Collection[int] | None = None,
    first_order: str | None = None,
) -> tuple[Tensor, ...]:
    """Returns `values` as differentiable functions of `inputs`.

    Gradient accumulation, loss scaling, clipping and trainers see ordinary gradients.

    Args:
        values: Results, without graph.
        inputs: What they depend on.
        pullback: Called once for every backward, under no_grad, with None for the cotangent of a
            value that no loss used.
        saved: Tensors the pullback needs; autograd frees them after backward, as it does its own.
        reached: The numbers of the inputs that the values' graphs would reach; default: all. Others
            are left out, since autograd runs the hooks of every input, even for None.
        first_order: The error message of a backward with `create_graph=True`. By default, only the
            second derivative is refused.
    """
    inputs.close()
    if in_static_ddp():
        pullback = _with_zeros(pullback, inputs)
    everything = range(len(inputs.tensors))
    # DDP waits for every parameter, used by this process or not.
    numbers = everything if in_ddp() or not reached else sorted(reached)
    out: tuple[Tensor, ...] = _Attached.apply(  # type: ignore[no-untyped-call]
        inputs,
        numbers,
        pullback,
        first_order,
        len(values),
        *values,
        *saved,
        *(inputs.tensors[i] for i in numbers),
    )
    return out


def _with_zeros(pullback: Pullback, inputs: Inputs) -> Pullback:
    """A pullback that gives every parameter a gradient.

    With `static_graph=True`, DDP ignores for good any parameter that had no gradient in the first
    step on any rank. With autograd's own graphs, DDP notices when such a parameter is used later;
    here every parameter is always an input, and its gradient would be lost without a word.
    """

    def complete(saved: Gradients, cotangents: Gradients) -> Gradients:
        found = list(pullback(saved, cotangents))
        for i, parameter in enumerate(inputs.tensors[: inputs.parameter_count]):
            found[i] = torch.zeros_like(parameter) if found[i] is None else found[i]
        return found

    return complete


@final
class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Inputs,
        numbers: Sequence[int],
        pullback: Pullback,
        first_order: str | None,
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.inputs = inputs
        ctx.numbers = numbers
        ctx.pullback = pullback
        ctx.first_order = first_order
        ctx.skipped = len(tensors) - len(numbers)
        ctx.save_for_backward(*tensors[count : ctx.skipped])
        ctx.set_materialize_grads(False)
        return tuple(value.clone() if value is not None else None for value in tensors[:count])

    @staticmethod
    @restoring
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.first_order is not None and torch.is_grad_enabled():
            raise HigherOrderError(ctx.first_order)
        with torch.no_grad():
            if ctx.inputs.ranks is None:  # else the ranks look together, each at its own
                ctx.inputs.freshness.check()
            found = ctx.pullback(ctx.saved_tensors, cotangents)
        gradients: Gradients = [_for_hooks(found[i], ctx.inputs, i) for i in ctx.numbers]
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated again
            gradients = _first_order_only(gradients, [*cotangents, *ctx.inputs.tensors])
        return (None, None, None, None, None, *([None] * ctx.skipped), *gradients)


def _for_hooks(gradient: Tensor | None, inputs: Inputs, number: int) -> Tensor | None:
    """Zeros for an input with hooks, if only poses of weight zero use it, as in plain autograd.

    The hooks run whatever is returned, and cannot take None.
    """
    if gradient is None and inputs.has_hooks(number):
        return torch.zeros_like(inputs.tensors[number])
    return gradient


def _first_order_only(gradients: Gradients, sources: Gradients) -> Gradients:
    """The gradients, with a node behind them that refuses a second derivative."""
    present = [g for g in gradients if g is not None]
    refused = _Refusal.apply(  # type: ignore[no-untyped-call]
        len(present), *present, *(s for s in sources if s is not None)
    )
    refusing = iter(refused)
    return [None if g is None else next(refusing) for g in gradients]


@final
class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor) -> tuple[None, ...]:
        raise HigherOrderError(
            "A second derivative was asked of combine() or embed(), whose poses' graphs are gone.\n"
            "Differentiating the gradient again needs all of them at once: use "
            "schedule='retain', which keeps them; for embed(), a chunk_size that takes all poses."
        )
