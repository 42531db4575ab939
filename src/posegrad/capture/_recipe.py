"""Finding out where every parameter's rows can be read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posegrad.capture._edges import EdgeRegistry
from posegrad.capture._sites import Site, beyond, carries_data, meets_itself, sites_of
from posegrad.capture._trial import Subject, Trial, attempt
from posegrad.jacobian import Arrangement

__all__ = ["Recipe", "named", "outlook", "resolve", "slow_parameters"]

_MOST_CLIMBED = 512  # sites beyond a parameter's own that are looked at together

_LARGEST_CLIMBED = 4  # times the parameter's size: what is larger is no weight


@dataclass(frozen=True)
class Recipe:
    """How the Jacobian of one structure of graph is read.

    Args:
        dim: The output's dimension that counts poses, None if every number is a pose.
        sites: Where rows are read.
        by_rows: Parameters that take a backward through the whole graph for each row, and why.
        activations: Numbers of nodes that rows are pulled back from and that data flows through.
        verified: Parameters whose rows were compared with autograd's gradient.
    """

    dim: int | None
    sites: tuple[Site, ...]
    by_rows: Mapping[str, str]
    activations: frozenset[int] = frozenset()
    verified: frozenset[str] = frozenset()


def resolve(subject: Subject, parameters: Mapping[str, Tensor]) -> tuple[Recipe, Trial]:
    """The recipe of a structure not met before, and the cotangents it needs.

    Args:
        subject: What is differentiated.
        parameters: Those that the output depends on.
    """
    registry, shape = subject.registry, subject.output.shape
    if registry.is_nested():
        return Recipe(None, (), dict.fromkeys(parameters, "tensors are nested")), Trial({}, {})
    sites = [
        site
        for name, parameter in parameters.items()
        for site in sites_of(
            registry, name, (registry.leaves[id(parameter)], 0), direct=True, light=True
        )
    ]
    best: tuple[int, Arrangement, Trial] | None = None
    for dim in _pose_dimensions(shape) if subject.dim is None else [subject.dim]:
        arrangement = Arrangement(shape, dim)
        trial = attempt(subject, arrangement, sites)
        mixed = sum(not trial.serves(site) for site in sites)
        if best is None or mixed < best[0]:
            best = mixed, arrangement, trial
        if not mixed:
            break
    assert best is not None
    _, arrangement, trial = best
    entering = {site.parameter for site in sites}
    lost = {name: "no operator takes it" for name in parameters if name not in entering}
    mixed_sites = [site for site in sites if not trial.serves(site)]
    if mixed_sites:
        further = _further(registry, mixed_sites, parameters)
        trial = trial.joined(attempt(subject, arrangement, further))
    settled = _settled(registry, sites, trial, lost)
    for name in parameters:
        if meets_itself(registry, [site for site in settled if site.parameter == name]):
            lost[name] = "its own uses meet"
    kept = tuple(site for site in settled if site.parameter not in lost)
    far = {site.source[0] for site in kept if not site.light}
    activations = frozenset(node for node in far if carries_data(registry, node))
    return Recipe(arrangement.dim, kept, lost, activations), trial


def outlook(registry: EdgeRegistry, name: str, parameter: Tensor) -> tuple[str, ...]:
    """How the rows of each use of a parameter would be read, as far as the graph alone can tell."""
    leaf = registry.leaves.get(id(parameter))
    if leaf is None:
        return ()
    sites = sites_of(registry, name, (leaf, 0), direct=True, light=True)
    kinds = [(named(registry.names[site.node]), site.closed) for site in sites]
    return tuple(
        f"closed form ({kind})" if closed else f"operator vjp ({kind}): no closed form"
        for kind, closed in kinds
    )


def named(kind: str) -> str:
    """An operator by the name of its node: `Addmm` of `AddmmBackward0`."""
    return re.sub(r"Backward\d*$", "", kind)


def slow_parameters(recipe: Recipe) -> list[str]:
    """The parameters that take a backward, or a part of one, for each row."""
    far = {site.parameter for site in recipe.sites if site.source[0] in recipe.activations}
    return sorted(recipe.by_rows.keys() | far)


def _settled(
    registry: EdgeRegistry, sites: Sequence[Site], trial: Trial, lost: dict[str, str]
) -> list[Site]:
    """The nearest sites to the parameters whose rows have owners; the rest is added to `lost`."""
    settled: dict[Site, None] = {}
    seen: set[Site] = set()  # a site is reached by many paths, of a deep network by 2^depth
    pending = list(sites)
    while pending:
        site = pending.pop()
        if site in seen:
            continue
        seen.add(site)
        if trial.serves(site):
            settled[site] = None
            continue
        further = beyond(registry, site) if trial.knows(site) else None
        if further is None:
            lost[site.parameter] = "poses mix"
        else:
            pending += further
    return [site for site in settled if site.parameter not in lost]


def _further(
    registry: EdgeRegistry, mixed: Sequence[Site], parameters: Mapping[str, Tensor]
) -> list[Site]:
    """All sites that may be read instead, where what lies between may be a weight."""
    found: dict[Site, None] = {}
    pending = list(mixed)
    while pending and len(found) < _MOST_CLIMBED:
        for site in beyond(registry, pending.pop()) or ():
            # What a weight enters may be of any size, as a network on the edges of all poses.
            size = registry.shape(site.source).numel()
            small = size <= _LARGEST_CLIMBED * max(parameters[site.parameter].numel(), 64)
            if site not in found and small:
                found[site] = None
                pending.append(site)
    return list(found)


def _pose_dimensions(shape: torch.Size) -> list[int | None]:
    """Ways to number poses, the most likely first: every number one, or one dimension."""
    several = [dim for dim, size in enumerate(shape) if 1 < size < shape.numel()]
    alone = [0] if len(shape) > 1 and shape[0] == 1 < shape.numel() else []
    return [None, *alone, *several]
