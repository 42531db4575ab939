"""Where the poses of a graph mix, for a message."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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
    used = registry.used(parameters)
    if not used or registry.is_nested:
        return ""
    generator = torch.Generator("cpu").manual_seed(0)
    subject = Subject(
        predictions, registry, used, (), 0, generator, [], {}, lambda: tensors, quiet=True
    )
    lock, aside, copied = python_contained(registry, used)
    with undisturbed(), lock, aside, copied:
        recipe, _ = resolve(subject)
    where = modules_of(slow_parameters(recipe))
    return f"{where} (at {', '.join(recipe.lost)})" if where and recipe.lost else where
