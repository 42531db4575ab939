"""Where the poses of a graph mix, for a message."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from posegrad._torch import memory_of
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._guard import python_contained, undisturbed
from posegrad.graph._recipe import resolve, slow_parameters
from posegrad.graph._subject import Subject
from posegrad.graph._warnings import modules_of

__all__ = ["mixing_modules"]


def mixing_modules(
    predictions: Tensor, parameters: Mapping[str, Tensor], tensors: Iterable[Tensor]
) -> str:
    """The modules whose activations do not belong, row by row, to single poses, and the operators.

    Empty if all do.

    Args:
        predictions: `[c, ...]`, one row for each pose, with their graph, which is kept.
        parameters: The trainable ones, by name.
        tensors: All parameters and buffers.
    """
    if not predictions.requires_grad:
        return ""
    registry = EdgeRegistry(predictions)
    used = {name: p for name, p in parameters.items() if id(p) in registry.leaves and p.numel()}
    if not used or registry.is_nested():
        return ""
    own = frozenset(map(memory_of, tensors))
    generator = torch.Generator("cpu").manual_seed(0)
    subject = Subject(
        predictions, registry, used, (), 0, generator, [], {}, lambda: own, quiet=True
    )
    lock, aside, copied = python_contained(registry, used)
    with undisturbed(), lock, aside, copied:
        recipe, _ = resolve(subject)
    where = modules_of(slow_parameters(recipe))
    return f"{where} (at {', '.join(recipe.lost)})" if where and recipe.lost else where
