"""Whether the poses of a graph stay apart, as its operators tell, and which modules mix them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._guard import python_contained, undisturbed
from posegrad.graph._inference import Trail
from posegrad.graph._recipe import resolve, slow_parameters, uses_of
from posegrad.graph._subject import Subject
from posegrad.graph._warnings import modules_of
from posegrad.jacobian import Arrangement

__all__ = ["keep_apart", "mixing_modules"]


def keep_apart(
    predictions: Tensor, parameters: Mapping[str, Tensor], tensors: Iterable[Tensor]
) -> bool:
    """Whether operators tell, one after another, that each row of a graph belongs to one pose.

    They must tell it at every place where a parameter enters. No graph shows whether poses were
    mixed in the data before.

    Args:
        predictions: `[c, ...]`, one row for each pose, with their graph, which is kept.
        parameters: The trainable ones, by name.
        tensors: All parameters and buffers.
    """
    subject = _subject(predictions, parameters, tensors)
    if subject is None:
        return False
    edges = [
        edge
        for name in subject.parameters
        for site in uses_of(subject, name)
        for edge in site.edges
    ]
    layouts = subject.layouts(Arrangement(predictions.shape, 0))
    return all(edge in layouts for edge in edges)


def mixing_modules(
    predictions: Tensor, parameters: Mapping[str, Tensor], tensors: Iterable[Tensor]
) -> str:
    """The modules with activations whose rows belong to no single pose, and the operators to blame.

    Empty if there are none.

    Args:
        predictions: `[c, ...]`, one row for each pose, with their graph, which is kept.
        parameters: The trainable ones, by name.
        tensors: All parameters and buffers.
    """
    subject = _subject(predictions, parameters, tensors)
    if subject is None:
        return ""
    lock, aside, copied = python_contained(subject.registry, subject.parameters)
    with undisturbed(), lock, aside, copied:
        recipe, _ = resolve(subject)
    where = modules_of(slow_parameters(recipe))
    return f"{where} (at {', '.join(recipe.lost)})" if where and recipe.lost else where


def _subject(
    predictions: Tensor, parameters: Mapping[str, Tensor], tensors: Iterable[Tensor]
) -> Subject | None:
    """The predictions' graph, and what is asked of it; None if there is nothing to ask."""
    if not predictions.requires_grad:
        return None
    registry = EdgeRegistry(predictions)
    used = registry.used(parameters)
    if not used or registry.is_nested:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    return Subject(
        predictions, registry, used, (), 0, generator, Trail(), lambda: tensors, quiet=True
    )
