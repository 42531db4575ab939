"""What is to be read of a graph, use by use, in the order in which it is read."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, final

from posegrad._torch import device_of
from posegrad.graph._edges import Edge, EdgeRegistry
from posegrad.graph._operators import kind_of
from posegrad.graph._read import Entry, Operator, Reader
from posegrad.graph._recipe import Recipe, slow_parameters
from posegrad.graph._recurrent import Opening
from posegrad.graph._release import Slot
from posegrad.graph._sites import Site
from posegrad.graph._subject import Subject
from posegrad.jacobian import Arrangement, Layout, Purpose

__all__ = ["SettledWorklist", "Use", "Worklist", "entry_of", "operator_at"]


@final
class Use(NamedTuple):
    """A site, and all that the structure of the graph tells of it.

    Args:
        site: The site.
        entry: How the parameter enters the operator.
        reader: How its closed form is read; None if the operator's own vjp is taken.
        opens: How to get at a product inside the operator, if the form is of that product.
        places: The numbers of the cotangents of the operator's outputs.
        spent: Those of them that no later use needs.
    """

    site: Site
    entry: Entry
    reader: Reader | None
    opens: Opening | None
    places: tuple[int, ...]
    spent: tuple[int, ...]


@final
@dataclass(frozen=True)
class Worklist:
    """A recipe, spelled out for graphs of one structure and one set of shapes.

    Args:
        recipe: The recipe.
        arrangement: The poses in the output.
        uses: Those with small cotangents first: once these are read, there is room for large ones.
        edges: Where cotangents are needed.
        operators: The numbers of the operators whose closed forms are read.
    """

    recipe: Recipe
    arrangement: Arrangement
    uses: list[Use]
    edges: list[Edge]
    operators: list[int]

    @classmethod
    def of(cls, subject: Subject, recipe: Recipe) -> Self:
        """The worklist for graphs like this one."""
        registry, sites = subject.registry, _by_size(subject.registry, recipe.sites)
        edges = list(dict.fromkeys(edge for site in sites for edge in site.edges))
        numbers = {edge: place for place, edge in enumerate(edges)}
        last = {edge: i for i, site in enumerate(sites) for edge in site.edges}
        uses = [
            Use(
                site,
                entry_of(registry, site),
                _reader(registry, site),
                kind_of(registry.names[site.node]).opens,
                tuple([numbers[edge] for edge in site.edges]),
                tuple([numbers[edge] for edge in site.edges if last[edge] == i]),
            )
            for i, site in enumerate(sites)
        ]
        read = {site.node for site in sites if site.closed}
        read |= {site.looked_up for site in sites if site.looked_up is not None}
        arrangement = Arrangement(subject.output.shape, recipe.dim)
        return cls(recipe, arrangement, uses, edges, [*read])


@final
@dataclass
class SettledWorklist:
    """A worklist in which nothing is open: where poses lie follows from what operators are.

    Its graphs take one backward for each component of a pose, and whatever rows take that have no
    closed form or are pulled back; nothing is compared. Of small networks all rows are taken
    together, wherever poses lie.

    Args:
        work: The worklist.
        layouts: Whose the rows of the cotangents are; None if there is only one pose, or each graph
            is looked at anew: for the numbers that pick rows, or for whether nobody's rows are
            zero, as they should be.
        packable: One slot of each operator that is read, to see whether a checkpoint holds it; of
            all operators, if all rows are taken together.
        left: The slots that the backward does not free.
        declined: The sites whose closed form does not serve these cotangents.
        together: Whether all rows are taken together.
        is_open: Whether rows taken together are the only way, as poses mix in front of all
            parameters.
        is_sure: Whether rows taken together were seen to be right.
    """

    work: Worklist
    layouts: list[Layout] | None
    packable: list[Slot]
    left: list[Slot]
    declined: frozenset[Site]
    together: bool
    is_open: bool = False
    is_sure: bool = False

    @classmethod
    def of(
        cls,
        subject: Subject,
        recipe: Recipe,
        slots: list[Slot],
        declined: Collection[Site] = (),
        *,
        together: bool = False,
    ) -> Self | None:
        """The worklist for graphs like this one; None if something is open."""
        registry = subject.registry
        if registry.has_python():
            return None
        arrangement = Arrangement(subject.output.shape, recipe.dim)
        several = arrangement.poses > 1
        is_open = bool(recipe.by_rows) or not recipe.sites
        inferred = subject.layouts(arrangement) if several and not is_open else {}
        if several and any(edge not in inferred for site in recipe.sites for edge in site.edges):
            is_open = True
        if is_open:  # whether poses mix must not depend on numbers: nobody looks at it again
            known = {*recipe.by_rows, *slow_parameters(recipe)}
            together &= known >= subject.parameters.keys()
        if is_open and not together:
            return None
        work = Worklist.of(subject, recipe)
        if is_open:
            return cls(work, None, _one_each(slots), [], frozenset(), together, is_open=True)
        read = {use.site.node for use in work.uses} | {*work.operators}
        freed = {*registry.above(read)}
        packable = _one_each(slots if together else [slot for slot in slots if slot[0] in read])
        left = [slot for slot in slots if slot[0] not in freed]
        layouts: list[Layout] | None = None
        if several and subject.is_fixed:
            found = [inferred[edge].to(device_of(registry.nodes[edge[0]])) for edge in work.edges]
            layouts = None if any(layout.has_dead_rows for layout in found) else found
        return cls(work, layouts, packable, left, frozenset(declined), together)

    @cached_property
    def spares_graph(self) -> bool:
        """Whether the backward may free the graph on its way: nothing is read after it."""
        reads_on = self.declined or any(
            use.reader is None or not (use.site.direct or use.site.light) for use in self.work.uses
        )
        return self.layouts is not None and self.work.arrangement.components == 1 and not reads_on

    @cached_property
    def takes_one(self) -> bool:
        """Whether one backward is all it takes, and nothing is to blame for more."""
        arrangement, uses = self.work.arrangement, self.work.uses
        is_fixed = self.layouts is not None or arrangement.poses == 1
        near = all(use.site.direct or use.site.light for use in uses)
        return is_fixed and arrangement.components == 1 and near

    def count(self, subject: Subject) -> None:
        """Counts its backwards unless there is just one; components and rows count theirs."""
        if self.takes_one:
            return
        work = self.work
        subject.backwards.add(Purpose.ACTIVATIONS, int(work.arrangement.components == 1))
        subject.blame(work.arrangement, work.edges)
        if work.recipe.lost:
            subject.backwards.blame(lost=work.recipe.lost)


def _one_each(slots: Iterable[Slot]) -> list[Slot]:
    """The first slot of each node."""
    first: dict[int, str] = {}
    for node, name in slots:
        first.setdefault(node, name)
    return [*first.items()]


def operator_at(registry: EdgeRegistry, node: int) -> Operator:
    """The operator of a node, as its forms are read from it."""
    return Operator(registry.nodes[node], registry.sizes[node][0], registry.dtypes[node][0], {})


def entry_of(registry: EdgeRegistry, site: Site) -> Entry:
    """How the parameter enters at a site."""
    return Entry(registry.shape(site.source), site.transposed, site.parameter)


def _reader(registry: EdgeRegistry, site: Site) -> Reader | None:
    """How its closed form is read; the formulas are those of real numbers, and of output 0."""
    kind, (_, first) = kind_of(registry.names[site.node]), site.edges[0]
    if not site.closed or registry.dtypes[site.node][0].is_complex:
        return None
    return kind.forms[site.argument] if first == 0 or kind.opens is not None else None


def _by_size(registry: EdgeRegistry, sites: Iterable[Site]) -> list[Site]:
    return sorted(sites, key=lambda site: max(registry.shape(e).numel() for e in site.edges))
