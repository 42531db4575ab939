"""Reading a graph of which all but the numbers is known.

The first Jacobian of a structure of graph finds out where to read, whose the rows are, and whether
they add up. Most of what it finds holds for every graph of that structure, and the next ones need
only what cannot be remembered: what the operators saved, and one backward. That backward may free
the graph on its way, as a plain one does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from posegrad._compat import device_of, is_packed_at
from posegrad.capture._axis import Axis
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._operators import kind_of
from posegrad.capture._read import Entry, Reader
from posegrad.capture._recipe import Recipe
from posegrad.capture._release import Slot, release
from posegrad.capture._rungs import Parts, by_size, entry_of, operator_at
from posegrad.capture._sites import Site
from posegrad.capture._trial import Subject
from posegrad.capture._vjp import cotangents_at
from posegrad.jacobian import Arrangement, Factors, Layout, Rows

__all__ = ["Routine"]


class _Use(NamedTuple):
    """A site, and all that is known of it.

    Args:
        parameter: The parameter's name.
        node: The number of the operator.
        entry: How the parameter enters it.
        reader: How its closed form is read.
        place: The number of its cotangent.
        layout: Whose the cotangent's rows are.
        path: How it is named in a report.
        shrinks: Whether its rows are held, as less than the cotangent.
        last: Whether no other use needs the cotangent after this one.
    """

    parameter: str
    node: int
    entry: Entry
    reader: Reader
    place: int
    layout: Layout
    path: str
    shrinks: bool
    last: bool


@dataclass(frozen=True)
class Routine:
    """How graphs of one structure are read.

    Args:
        uses: In the order in which they are read.
        edges: Where cotangents are needed.
        arrangement: The poses in the output.
        read_at: The operators that are read.
        first_slots: One slot of each, if it has any, to see whether it is packed.
        other_slots: The slots that a backward to the edges does not free.
    """

    uses: list[_Use]
    edges: list[Edge]
    arrangement: Arrangement
    read_at: list[int]
    first_slots: list[Slot]
    other_slots: list[Slot]

    @classmethod
    def of(cls, subject: Subject, recipe: Recipe, parts: Parts, slots: list[Slot]) -> Self | None:
        """The routine for graphs like this one; None if they have to be looked at each time.

        It takes closed forms of parameters alone, one component a pose, and owners that follow from
        the structure and no number.
        """
        registry, arrangement = subject.registry, Arrangement(subject.output.shape, recipe.dim)
        several = arrangement.poses > 1 == arrangement.components
        if not several or recipe.by_rows or registry.has_python():
            return None
        axes = subject.axes(arrangement)
        if not all(_is_plain(registry, site, axes) for site in recipe.sites):
            return None
        found = [part for own in parts.values() for part in own]
        closed = all(part.path.startswith("closed") for part in found)
        if len(found) < len(recipe.sites) or not closed:
            return None
        read = {name: iter(own) for name, own in parts.items()}  # in the order of the sites below
        edges = list(dict.fromkeys(edge for site in recipe.sites for edge in site.edges))
        layouts = {edge: axes[edge].layout(device_of(registry.nodes[edge[0]])) for edge in edges}
        sites = by_size(registry, recipe.sites)
        uses = []
        for i, site in enumerate(sites):
            part = next(read[site.parameter])
            use = _Use(
                site.parameter,
                site.node,
                entry_of(registry, site),
                kind_of(registry.names[site.node]).forms[site.argument],
                edges.index(site.edges[0]),
                layouts[site.edges[0]],
                part.path,
                shrinks=isinstance(part, Rows),
                last=all(site.edges != other.edges for other in sites[i + 1 :]),
            )
            uses.append(use)
        read_at = {site.node for site in sites}
        freed = {*registry.above(read_at)}
        first = {node: name for node, name in reversed(slots) if node in read_at}
        left = [slot for slot in slots if slot[0] not in freed]
        return cls(uses, edges, arrangement, [*read_at], [*first.items()], left)

    def parts(
        self, registry: EdgeRegistry, output: Tensor, names: Iterable[str], keep_graph: bool
    ) -> Parts | None:
        """The parts of each parameter's block; the graph is freed.

        Returns:
            None if something is special this time, before anything has been done.
        """
        nodes = registry.nodes
        if any(is_packed_at(nodes[number], name) for number, name in self.first_slots):
            return None  # by a checkpoint, which had better be read in one go
        operators = {node: operator_at(registry, node) for node in self.read_at}
        forms = [use.reader(operators[use.node], use.entry) for use in self.uses]
        if None in forms:
            return None
        ones = torch.ones_like(output)  # not kept: a hook may write to it
        values = cotangents_at(output, registry.at(self.edges), ones, keep_graph=keep_graph)
        if not keep_graph:
            release(registry, self.other_slots)
        found: Parts = {name: [] for name in names}
        for use, form in zip(self.uses, forms, strict=True):
            value = values[use.place]
            if value is not None and form is not None:
                part = Factors(use.path, 0, form, use.layout, self.arrangement, (value,))
                found[use.parameter].append(part.as_rows() if use.shrinks else part)
            if use.last:
                values[use.place] = None
        return found


def _is_plain(registry: EdgeRegistry, site: Site, axes: Mapping[Edge, Axis]) -> bool:
    """Whether all there is to know of a site follows from the structure."""
    axis = axes.get(site.edges[0]) if len(site.edges) == 1 else None
    if axis is None or axis.owners is not None:
        return False
    return site.direct and site.closed and not registry.dtypes[site.node][0].is_complex
