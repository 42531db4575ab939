"""Leaves that an output depends on beside the engine's parameters, and its gradients by them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from posegrad._restoring import leaf_hooks_off
from posegrad._torch import slot_names
from posegrad.graph._edges import EdgeRegistry
from posegrad.graph._guard import (
    failures_named,
    listened_to,
    python_contained,
    retained_set_aside,
    undisturbed,
)
from posegrad.graph._vjp import dense
from posegrad.jacobian import wide

__all__ = ["Beside", "gradients_of_sum", "leaves_beside"]

_STEP = 8  # powers of two by which a scale is lowered if gradients overflow float16
_LEAST = -24


@final
@dataclass
class Beside:
    """Leaves that an output depends on beside the parameters of its Jacobian.

    Args:
        leaves: The leaves.
        gradients: The gradients of the output's sum by these leaves, once they are known.
    """

    leaves: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] | None = None


def leaves_beside(registry: EdgeRegistry, own: Collection[int]) -> list[Tensor]:
    """The leaves of a graph that require grad, except some.

    Args:
        registry: The graph.
        own: The leaves to leave out, by `id`.
    """
    nodes = [registry.nodes[number] for key, number in registry.leaves.items() if key not in own]
    leaves: list[Tensor] = [node.variable for node in nodes]  # type: ignore[attr-defined]
    return [leaf for leaf in leaves if leaf.requires_grad]  # others were frozen since


def gradients_of_sum(
    output: Tensor,
    registry: EdgeRegistry,
    leaves: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    exponent: int | None,
) -> list[Tensor | None]:
    """The gradient of an output's sum by some leaves, by one plain backward; the graph is kept.

    Args:
        output: The output.
        registry: Its graph.
        leaves: The leaves.
        parameters: The engine's parameters, by name, whose `.grad` must stay as it is, too.
        exponent: The power of two by which the output is scaled meanwhile, so that float16 holds
            its gradients; it is lowered while they overflow. None for no scale.
    """
    if not leaves:
        return []
    nodes = enumerate(registry.nodes)
    slots = [(number, name) for number, node in nodes for name in slot_names(node)]
    heard = listened_to(output, registry, slots)
    named = dict(parameters) | {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
    lock, aside, copied = python_contained(registry, named)
    with undisturbed(), lock, aside, copied, failures_named(), retained_set_aside(heard):
        if exponent is None:
            return _gradients(output, leaves, 0)
        found = _gradients(output, leaves, exponent)
        while exponent > _LEAST and not _are_finite(found):
            exponent -= _STEP
            found = _gradients(output, leaves, exponent)
    return [None if g is None else wide(g) * 2.0**-exponent for g in found]


def _gradients(output: Tensor, leaves: Sequence[Tensor], exponent: int) -> list[Tensor | None]:
    if exponent:
        with torch.enable_grad():
            output = wide(output) * 2.0**exponent
    with leaf_hooks_off(leaves):
        found = torch.autograd.grad(
            output, tuple(leaves), torch.ones_like(output), retain_graph=True, allow_unused=True
        )
    return [None if g is None else dense(g) for g in found]


def _are_finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients)
