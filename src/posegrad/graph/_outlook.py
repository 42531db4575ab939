"""How a Jacobian would be read, as far as its graph alone can tell."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

from torch import Tensor

from posegrad.graph._edges import Edge, named
from posegrad.graph._probes import make_probes
from posegrad.graph._probing import narrowest
from posegrad.graph._pulled import pulls
from posegrad.graph._recipe import Recipe, pose_dimensions, uses_of
from posegrad.graph._sites import Site
from posegrad.graph._subject import Subject
from posegrad.graph._worklist import SettledWorklist
from posegrad.jacobian import Arrangement, Backwards, Purpose

__all__ = ["Outlook", "foreseen"]


@final
class Outlook(NamedTuple):
    """What reading a Jacobian would take.

    Args:
        paths: For each parameter how the rows of each use are read, unless poses mix.
        backwards: The backwards that a call takes; more if probes find that poses mix.
        is_known: Whether a graph like this one was read before.
        may_mix: Whether poses may mix, as far as is known.
    """

    paths: Mapping[str, tuple[str, ...]]
    backwards: Backwards
    is_known: bool
    may_mix: bool


def foreseen(
    subject: Subject,
    parameters: Mapping[str, Tensor],
    recipe: Recipe | None,
    work: SettledWorklist | None,
    *,
    is_due: bool,
) -> Outlook:
    """What reading would take; nothing is read, and only backwards of single operators are run.

    Args:
        subject: The output and its graph.
        parameters: All there are, by name; the output depends on some.
        recipe: The structure's recipe, if graphs like this one were read before.
        work: Its worklist, if nothing in it is open.
        is_due: Whether a comparison with plain autograd is due.
    """
    own = {name: [*uses_of(subject, name)] for name in subject.parameters}
    paths = {name: _paths(subject, own.get(name, ())) for name in parameters}
    sites = [site for found in own.values() for site in found] if recipe is None else recipe.sites
    edges = list(dict.fromkeys(edge for site in sites for edge in site.edges))
    arrangement, unknown = _likeliest(subject, edges, recipe)
    subject.blame(arrangement, edges)
    backwards, components = subject.backwards, arrangement.components
    if work is not None and work.together and not is_due:
        backwards.add(Purpose.TOGETHER)
        return Outlook(paths, backwards, is_known=True, may_mix=False)
    if edges:
        settles = recipe is None and not unknown and not subject.registry.has_python()
        alone = components > 1 and not is_due and (work is not None or settles)
        backwards.add(Purpose.ACTIVATIONS, 0 if alone else 1)
        backwards.add(Purpose.COMPONENTS, components if components > 1 else 0)
        _add_probes(subject, arrangement, unknown)
    if recipe is not None:
        rows = arrangement.shape.numel()
        backwards.blame(lost=recipe.lost)
        backwards.add(Purpose.PULLS, rows * pulls(subject, recipe.sites))
        backwards.add(Purpose.ROWS, rows if recipe.by_rows else 0)
    backwards.add(Purpose.CHECK, int(is_due))
    known = recipe is not None
    return Outlook(paths, backwards, known, may_mix=bool(unknown) and not known)


def _paths(subject: Subject, sites: Sequence[Site]) -> tuple[str, ...]:
    kinds = [(named(subject.registry.names[site.node]), site.closed) for site in sites]
    return tuple(
        f"closed form ({kind})" if closed else f"operator vjp ({kind}): no closed form"
        for kind, closed in kinds
    )


def _likeliest(
    subject: Subject, edges: list[Edge], recipe: Recipe | None
) -> tuple[Arrangement, list[Edge]]:
    """The way to number poses that leaves the fewest edges to be probed, and these."""
    shape, dims = subject.output.shape, [subject.dim]
    if recipe is not None:
        dims = [recipe.dim]
    elif subject.dim is None:
        dims = pose_dimensions(shape)
    best: tuple[Arrangement, list[Edge]] | None = None
    for arrangement in (Arrangement(shape, dim) for dim in dims):
        unknown: list[Edge] = []
        if edges and arrangement.poses > 1:
            layouts = subject.layouts(arrangement)
            unknown = [edge for edge in edges if edge not in layouts]
        if best is None or len(unknown) < len(best[1]):
            best = arrangement, unknown
    assert best is not None
    return best


def _add_probes(subject: Subject, arrangement: Arrangement, unknown: list[Edge]) -> None:
    """Counts what `attempt` takes to find the owners of some rows, if there are no faint poses."""
    if not unknown:
        return
    passed = [dtype for node, _ in unknown for dtype in subject.registry.dtypes_passed[node]]
    dtype = narrowest([subject.output.dtype, *passed])
    sets = make_probes(arrangement.poses, dtype, subject.generator).sets
    parts = arrangement.components
    subject.backwards.add(Purpose.PROBES, len(sets))
    subject.backwards.add(Purpose.PROBES, parts * (1 + sets.count(0)) if parts > 1 else 0)
