"""Finding out where every parameter's rows can be read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch

from posegrad.graph._edges import Edge, EdgeRegistry
from posegrad.graph._sites import (
    Site,
    beyond,
    carries_data,
    may_be_shared,
    meets_itself,
    sites_of,
)
from posegrad.graph._subject import Subject
from posegrad.graph._trial import Trial, attempt
from posegrad.jacobian import Arrangement, Layout

__all__ = [
    "Recipe",
    "first_look",
    "is_followed",
    "keeps_apart",
    "of_rows",
    "pose_dimensions",
    "resolve",
    "slow_parameters",
    "uses_of",
]

_MOST_CLIMBED = 512  # sites beyond a parameter's own that are looked at together

_LARGEST_CLIMBED = 4  # times the parameter's size: what is larger is no weight


_FEW = 8  # so few rows are not worth a search for owners

FEW_ROWS = "a few numbers put together"
"""The reason for taking rows one by one where that is not slow."""


@final
@dataclass(frozen=True)
class Recipe:
    """How the Jacobian of one structure of graph is read.

    Args:
        dim: The output's dimension that counts poses, None if every number is a pose.
        sites: Where rows are read.
        by_rows: Parameters that take a backward through the whole graph for each row, and why.
        activations: The nodes, by number, that rows are pulled back from although they were
            computed from data too.
        lost: Operators through which poses could not be followed to where parameters enter.
        verified: Parameters whose rows were compared with autograd's gradient.
    """

    dim: int | None
    sites: tuple[Site, ...]
    by_rows: Mapping[str, str]
    activations: frozenset[int] = frozenset()
    lost: tuple[str, ...] = ()
    verified: frozenset[str] = frozenset()


def resolve(subject: Subject) -> tuple[Recipe, Trial]:
    """The recipe of a structure not met before, and the cotangents it needs."""
    registry, parameters = subject.registry, subject.parameters
    sites = [site for name in parameters for site in uses_of(subject, name)]
    arrangement, trial = first_look(subject, sites)
    entering = {site.parameter for site in sites}
    lost = {name: "no operator takes it" for name in parameters if name not in entering}
    own = subject.own()
    layouts = subject.layouts(arrangement)
    data: dict[tuple[Edge, int, int], bool] = {}

    def has_data(site: Site) -> bool:
        use = site.source, site.node, site.argument
        if use not in data:
            data[use] = carries_data(registry, site, layouts, own)
        return data[use]

    mixed_sites = [site for site in sites if not trial.serves(site)]
    if mixed_sites:
        further = _further(subject, mixed_sites, layouts, has_data, own)
        trial = trial.joined(attempt(subject, arrangement, further))
    settled = _settled(registry, sites, trial, lost)
    for name in parameters:
        if meets_itself(registry, [site for site in settled if site.parameter == name]):
            lost[name] = "its own uses meet"
    far = [s for s in settled if not (s.direct or s.light) and s.parameter not in lost]
    if far and _is_dear(registry, far):
        lost |= dict.fromkeys([site.parameter for site in far], "poses mix")
    kept = tuple(site for site in settled if site.parameter not in lost)
    left = [site for site in far if site.parameter not in lost]
    activations = frozenset(site.source[0] for site in left if has_data(site))
    mixed_at = [edge for site in mixed_sites for edge in site.edges]
    through = tuple(subject.lost_at(arrangement, mixed_at))
    subject.blame(arrangement, [edge for site in sites for edge in site.edges])
    return Recipe(arrangement.dim, kept, lost, activations, through), trial


def of_rows(subject: Subject) -> Recipe | None:
    """The recipe that takes all rows of the whole graph, if no other is worth a look; else None."""
    if subject.registry.is_nested:
        why = "tensors are nested"
    elif _is_few_losses(subject):
        why = FEW_ROWS
    else:
        return None
    return Recipe(None, (), dict.fromkeys(subject.parameters, why))


def uses_of(subject: Subject, name: str) -> Iterator[Site]:
    """The sites of a parameter itself."""
    registry, parameter = subject.registry, subject.parameters[name]
    source = registry.leaves[id(parameter)], 0
    return sites_of(registry, name, source, direct=True, light=True)


def _is_few_losses(subject: Subject) -> bool:
    """Whether the output is a few numbers that were put together, as the losses of several tasks.

    Each number then is a pose by itself, and what they share belongs to none of them. One plain
    backward for each costs no more than finding that out.
    """
    arrangement = Arrangement(subject.output.shape, None)
    if not 1 < arrangement.poses <= _FEW or subject.pose_index:
        return False
    layouts = subject.layouts(arrangement)
    if not any(layout.is_whole for layout in layouts.values()):
        return False
    sites = (site for name in subject.parameters for site in uses_of(subject, name))
    told = [layouts.get(edge) for site in sites for edge in site.edges]
    return None in told


def first_look(subject: Subject, sites: Sequence[Site]) -> tuple[Arrangement, Trial]:
    """The arrangement of poses under which they mix at the fewest sites, and what is seen there."""
    shape = subject.output.shape
    dims = pose_dimensions(shape) if subject.dim is None else [subject.dim]
    told = [dim for dim in dims if _is_told(subject, Arrangement(shape, dim), sites)]
    best: tuple[int, Arrangement, Trial] | None = None
    for dim in told[:1] or dims:
        arrangement = Arrangement(shape, dim)
        trial = attempt(subject, arrangement, sites)
        mixed = sum(not trial.serves(site) for site in sites)
        if best is None or mixed < best[0]:
            best = mixed, arrangement, trial
        if not mixed:
            break
    assert best is not None
    return best[1:]


def is_followed(subject: Subject, recipe: Recipe) -> bool:
    """Whether operators tell where poses lie at every edge that a recipe reads."""
    layouts = subject.layouts(Arrangement(subject.output.shape, recipe.dim))
    return all(edge in layouts for site in recipe.sites for edge in site.edges)


def keeps_apart(subject: Subject, recipe: Recipe) -> bool:
    """Whether the numbers that pick rows keep poses apart this time, at all uses of parameters."""
    if subject.registry.is_nested:
        return False
    arrangement = Arrangement(subject.output.shape, recipe.dim)
    layouts = subject.layouts(arrangement)
    if subject.is_fixed:
        return False  # no numbers pick rows
    sites = (site for name in subject.parameters for site in uses_of(subject, name))
    return all(edge in layouts for site in sites for edge in site.edges)


def _is_told(subject: Subject, arrangement: Arrangement, sites: Sequence[Site]) -> bool:
    """Whether operators tell whose all rows are, and poses have few enough components.

    A backward for each component then costs less than probes.
    """
    if arrangement.components > _FEW:
        return False
    layouts = subject.layouts(arrangement)
    return all(edge in layouts for site in sites for edge in site.edges)


def pose_dimensions(shape: torch.Size) -> list[int | None]:
    """Ways to number poses, likeliest first: every number is one, or one dimension counts them."""
    several = [dim for dim, size in enumerate(shape) if 1 < size < shape.numel()]
    alone = [0] if len(shape) > 1 and shape[0] == 1 < shape.numel() else []
    return [None, *alone, *several]


def slow_parameters(recipe: Recipe) -> list[str]:
    """The parameters that take a backward, or a part of one, for each row."""
    far = {site.parameter for site in recipe.sites if site.source[0] in recipe.activations}
    slow = {name for name, why in recipe.by_rows.items() if why != FEW_ROWS}
    return sorted(slow | far)


def _settled(
    registry: EdgeRegistry, sites: Sequence[Site], trial: Trial, lost: dict[str, str]
) -> list[Site]:
    """The nearest sites at which all rows have owners; parameters without such go to `lost`."""
    settled: dict[Site, None] = {}
    seen: set[Site] = set()  # a site is reached by many paths, in a deep network by 2^depth
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
    subject: Subject,
    mixed: Sequence[Site],
    layouts: Mapping[Edge, Layout],
    has_data: Callable[[Site], bool],
    own: frozenset[int],
) -> list[Site]:
    """All sites that may be read instead, where what lies between may be a weight."""
    registry, parameters = subject.registry, subject.parameters
    found: dict[Site, None] = {}
    pending = list(mixed)
    while pending and len(found) < _MOST_CLIMBED:
        for site in beyond(registry, pending.pop()) or ():
            if site in found:
                continue
            told = all(edge in layouts for edge in site.edges)
            size = registry.shape(site.source).numel()
            small = size <= _LARGEST_CLIMBED * max(parameters[site.parameter].numel(), 64)
            # The size is that of the weight: the operator that it enters may be of any size, as in
            # a network on the edges of all poses.
            if told or small or not has_data(site) or may_be_shared(registry, site, own):
                found[site] = None
                pending += [] if told else [site]
    return list(found)


def _is_dear(registry: EdgeRegistry, far: Sequence[Site]) -> bool:
    """Whether rows of the whole graph cost no more than those of tensors computed from parameters.

    Both take a backward for each row: one through all numbers of the graph, for all parameters
    together; the other through those below such a tensor, for the parameters it was computed from.
    """
    groups: dict[frozenset[Edge], None] = {}
    for name in {site.parameter for site in far}:
        own = [site.source for site in far if site.parameter == name and site.looked_up is None]
        groups[frozenset(own)] = None
    cost = sum(registry.shape(source).numel() for source in {site.source for site in far})
    for sources in groups:
        between = set[int]().union(*(registry.below(node) for node, _ in sources))
        cost += sum(_numbers(registry, node) for node in between)
    return cost >= sum(_numbers(registry, node) for node in range(len(registry.nodes)))


def _numbers(registry: EdgeRegistry, node: int) -> int:
    return sum(prod(shape) for shape in registry.sizes[node])
