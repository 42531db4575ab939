"""Finding out where every parameter's rows can be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posegrad.capture._edges import EdgeRegistry
from posegrad.capture._sites import Site, beyond, carries_data, meets_itself, sites_of
from posegrad.capture._trial import Subject, Trial, attempt
from posegrad.jacobian import Arrangement

__all__ = ["Recipe", "outlook", "resolve", "slow_parameters"]

_MOST_CLIMBED = 512  # sites beyond a parameter's own that are looked at together

_LARGEST_CLIMBED = 4  # times the parameter's size: what is larger is no weight


@dataclass(frozen=True)
class Recipe:
    """How the Jacobian of one structure of graph is read.

    Args:
        dim: The output's dimension that counts poses, None if every number is a pose.
        sites: Where rows are read.
        by_rows: Parameters that take a backward through the whole graph for each row.
        activations: Numbers of nodes that rows are pulled back from and that data flows through.
        verified: Parameters whose rows were compared with autograd's gradient.
    """

    dim: int | None
    sites: tuple[Site, ...]
    by_rows: frozenset[str]
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
        return Recipe(None, (), frozenset(parameters)), Trial({}, {})
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
    lost = {name for name in parameters if not any(site.parameter == name for site in sites)}
    mixed_sites = [site for site in sites if not trial.serves(site)]
    if mixed_sites:
        further = _further(registry, mixed_sites, parameters)
        trial = trial.joined(attempt(subject, arrangement, further))
    settled = _settled(registry, sites, trial, lost)
    for name in parameters:
        if meets_itself(registry, [site for site in settled if site.parameter == name]):
            lost.add(name)
    kept = tuple(site for site in settled if site.parameter not in lost)
    far = {site.source[0] for site in kept if not site.light}
    activations = frozenset(node for node in far if carries_data(registry, node))
    return Recipe(arrangement.dim, kept, frozenset(lost), activations), trial


def outlook(registry: EdgeRegistry, name: str, parameter: Tensor) -> str:
    """How a parameter's rows would be read, as far as the graph alone can tell."""
    leaf = registry.leaves.get(id(parameter))
    if leaf is None:
        return "unused"
    kinds: dict[str, int] = {}
    for site in sites_of(registry, name, (leaf, 0), direct=True, light=True):
        rung = "closed form" if site.closed else "operator vjp"
        kind = f"{rung} ({registry.names[site.node]})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())


def slow_parameters(recipe: Recipe) -> list[str]:
    """The parameters that take a backward, or a part of one, for each row."""
    far = {site.parameter for site in recipe.sites if site.source[0] in recipe.activations}
    return sorted(recipe.by_rows | far)


def _settled(
    registry: EdgeRegistry, sites: Sequence[Site], trial: Trial, lost: set[str]
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
            lost.add(site.parameter)
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
            node, number = site.source
            size = registry.shapes[node][number].numel()
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
