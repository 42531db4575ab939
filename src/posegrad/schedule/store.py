"""Schedule `store`: keep the rows of the Jacobian instead of the graphs."""

from typing import cast

import torch
from torch import Tensor

from posegrad._restoring import no_autocast
from posegrad.combination import Combination
from posegrad.jacobian import Block, Weights
from posegrad.schedule._attach import Gradients
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._poses import map_tensors, tensors_of
from posegrad.schedule._result import Combined, combined
from posegrad.schedule._run import Chunk, Run

__all__ = ["store"]

Held = dict[int, Block | Tensor]
"""The rows of one chunk by number of input; if it has one number, its gradient."""


def store(run: Run, rule: Combination) -> Combined:
    """Differentiates every pose at once, as mtenn does, and weights the gradients in backward.

    Memory: the rows of m poses, each parameter's in the smaller form (times d for predictions of d
    numbers). Time: one forward for each pose, and a backward to the activations. Serves any rule
    and any loss of both outputs, and scores no pose twice.
    """
    values: list[Tensor] = []
    rows: list[Held] = []

    def scored() -> list[Tensor]:
        for chunk in run.chunks(with_graph=True):
            rows.append(_rows(run, chunk))
            values.append(chunk.predictions.detach())
        run.check_differentiable()
        return values

    predictions = run.group(scored)
    saved = tensors_of(rows)
    empty = torch.empty(0, device="cpu")
    shells = map_tensors(lambda _: empty, rows)  # autograd frees the tensors themselves
    sizes = [value.numel() for value in values]

    def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
        (cotangent,) = cotangents
        total = GradientSum()
        if cotangent is not None:
            tensors = iter(saved)
            filled: list[Held] = map_tensors(lambda _: cast("Tensor", next(tensors)), shells)
            own = cotangent[run.own.start : run.own.stop]
            pieces = torch.split(own.reshape(-1), sizes)
            with no_autocast():
                for weights, blocks in zip(pieces, filled, strict=True):
                    if bool(weights.any()):
                        _add(total, blocks, Weights(weights))
        return total.delivered(run.inputs.tensors)

    return combined(run, rule, predictions, pullback, saved)


def _add(total: GradientSum, rows: Held, weights: Weights) -> None:
    """Adds the rows of one chunk, times their weights."""
    for number, held in rows.items():
        if isinstance(held, Tensor):
            total.add({number: held}, float(weights.values))
        else:
            total.add({number: held.combine(weights)})


def _rows(run: Run, chunk: Chunk) -> Held:
    """The rows of one chunk's Jacobian, for the inputs it depends on."""
    flat = chunk.predictions.reshape(-1)
    if len(flat) == 1:
        return {**run.inputs.gradients(flat, torch.ones_like(flat), chunk.leaves)}
    sources = run.inputs.sources(chunk.leaves)
    tensors = {name: tensor for name, (_, tensor) in sources.items()}
    jacobian = run.gatherer.read(chunk.predictions, tensors, must_depend=False, quiet=True)
    blocks = jacobian.in_form("auto").blocks
    return {sources[name][0]: block for name, block in blocks.items() if block.parts}
