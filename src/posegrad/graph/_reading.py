"""The ladder: closed forms, the vjp of one operator, rows of the whole graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from posegrad._torch import dtype_of, is_listened_to, is_packed, is_packed_at
from posegrad.graph._alone import in_backward
from posegrad.graph._edges import LEAF_NAME, EdgeRegistry, named
from posegrad.graph._moves import viewed
from posegrad.graph._operators import kind_of
from posegrad.graph._pulled import Far, entries, lifted, pulled
from posegrad.graph._read import Operator, form_of
from posegrad.graph._recipe import Recipe, slow_parameters, uses_of
from posegrad.graph._recurrent import Opening
from posegrad.graph._release import Slot, release
from posegrad.graph._sites import Site, looks_up
from posegrad.graph._subject import Subject
from posegrad.graph._trial import Trial, known_layout
from posegrad.graph._vjp import (
    cotangents_at,
    node_rows,
    rows_of_each,
    rows_of_graph,
    rows_together,
)
from posegrad.graph._worklist import SettledWorklist, Use, Worklist, operator_at
from posegrad.jacobian import (
    NOBODY,
    Arrangement,
    ClosedForm,
    Factors,
    Layout,
    Part,
    Pull,
    Purpose,
    Rows,
)
from posegrad.jacobian.layers import Embedding

__all__ = ["Forms", "Looked", "Parts", "Reading", "Tables"]

Parts = dict[str, list[Part]]

_LARGE = 2**13  # numbers of an operator that take longer than calling it

Forms = list[ClosedForm | None]
"""The closed form of each use of a worklist."""

Tables = Mapping[int, Embedding | None]
"""The tables that rows were looked up in, by operator; None if no form can be read."""


@final
@dataclass
class Looked:
    """The cotangents of a worklist's edges, and whose their rows are.

    Args:
        columns: For each component of the output those of all edges; None where nothing flows.
        layouts: By edge; None where poses mix.
    """

    columns: list[list[Tensor | None]]
    layouts: list[Layout | None]

    def flows(self, places: Sequence[int]) -> bool:
        """Whether any of the cotangents at some places is more than zeros."""
        values = (column[place] for column in self.columns for place in places)
        return any(value is not None and bool(value.any()) for value in values)


@final
@dataclass(frozen=True)
class Reading:
    """One Jacobian being read.

    Args:
        subject: What is differentiated.
        block_bytes: About how much memory rows without a closed form may take at once.
        watched: Parameters for which the reading notes whether anything flows to them.
        flowing: Those of the watched parameters that something flows to.
        declined: The sites whose closed form was found not to serve.
    """

    subject: Subject
    block_bytes: int
    watched: frozenset[str] = frozenset()
    flowing: set[str] = field(default_factory=set)
    declined: set[Site] = field(default_factory=set)
    _answers: dict[int, dict[int, Tensor | None]] = field(default_factory=dict)  # node, argument
    _operators: dict[int, Operator] = field(default_factory=dict)
    _insides: dict[int, tuple[Layout | None, list[Tensor | None]]] = field(default_factory=dict)

    def settled(
        self, settled: SettledWorklist, slots: list[Slot], *, keep_graph: bool
    ) -> Parts | None:
        """The parts of each parameter's block by a worklist in which nothing is open.

        Returns:
            None if something is special this time; the graph is as it was.
        """
        registry = self.registry
        if any(is_packed_at(registry.nodes[number], name) for number, name in settled.packable):
            return None  # by a checkpoint, which had better be read in one go
        if settled.together:
            if not settled.is_open and not self._stay_apart(settled):
                return None
            parts = self._together(settled)
            if parts is not None and not keep_graph:
                release(registry, slots)
            settled.together = parts is not None
            if parts is not None:
                settled.is_sure |= any(p.is_live() for own in parts.values() for p in own)
                return parts
        if settled.is_open:
            return None
        return self._use_by_use(settled, slots, keep_graph=keep_graph)

    def _use_by_use(
        self, settled: SettledWorklist, slots: list[Slot], *, keep_graph: bool
    ) -> Parts | None:
        """The parts by their closed forms, use by use; None as for `settled`."""
        work, registry = settled.work, self.registry
        forms, tables = self.forms(work)
        for use, form in zip(work.uses, forms, strict=True):
            if form is None and use.reader and use.site not in settled.declined:
                return None
        if not self._stay_apart(settled):
            return None
        layouts: list[Layout | None] | None = None
        if settled.layouts is not None:
            layouts = [*settled.layouts]
        frees = settled.spares_graph and not keep_graph
        columns = self._columns(work, keep_graph=not frees)
        settled.count(self.subject)
        if layouts is None:
            layouts = self._layouts(work, columns)
            if layouts is None:
                return None
        parts = self.multiplied(work, forms, tables, Looked(columns, layouts))
        if not keep_graph:
            release(registry, settled.left if frees else slots)
        return parts

    def _stay_apart(self, settled: SettledWorklist) -> bool:
        """Whether the poses of this graph can be followed to all that is read."""
        work = settled.work
        if settled.layouts is not None or work.arrangement.poses == 1:
            return True
        layouts = self.subject.layouts(work.arrangement)
        return all(edge in layouts for edge in work.edges)

    def open(self, recipe: Recipe, trial: Trial) -> Parts:
        """The parts by a recipe and the cotangents of a trial, which is emptied on the way."""
        work = Worklist.of(self.subject, recipe)
        forms, tables = self.forms(work)
        columns = [[trial.cotangents.get(edge) for edge in work.edges]]
        if work.arrangement.components > 1:
            columns = self._columns(work, keep_graph=True)
        layouts = [trial.layouts.get(edge) for edge in work.edges]
        self._answers.clear()
        self._insides.clear()
        trial.cotangents.clear()
        self.subject.backwards.blame(lost=recipe.lost)
        found = self.multiplied(work, forms, tables, Looked(columns, layouts))
        found.update(self._by_rows(recipe.by_rows))
        return found

    def forms(self, work: Worklist) -> tuple[Forms, Tables]:
        """Reads what the operators saved, all in one go: a checkpoint recomputes but once.

        Returns:
            The form of each use, and those of tables that rows were looked up in, by operator.
        """
        at = self._operators
        at.update({node: operator_at(self.registry, node) for node in work.operators})
        parameters = self.subject.parameters
        forms: Forms = []
        tables: dict[int, Embedding | None] = {}

        def read_all() -> None:
            for use in work.uses:
                forms.append(use.reader and form_of(use.reader, at[use.site.node], use.entry))
                looked_up = use.site.looked_up
                if looked_up is not None:
                    tables[looked_up] = lifted(
                        at[looked_up], parameters[use.site.parameter], use.site
                    )

        if any(is_packed(operator.node) for operator in at.values()):
            in_backward(read_all)
        else:
            read_all()
        return forms, tables

    def _columns(self, work: Worklist, *, keep_graph: bool) -> list[list[Tensor | None]]:
        """The cotangents of each component of the output: one backward for each."""
        output, arrangement = self.subject.output, work.arrangement
        edges = self.registry.at(work.edges)
        if not edges:
            return [[] for _ in range(arrangement.components)]
        if arrangement.components == 1:
            ones = torch.ones_like(output)  # not kept: a hook may write to it
            return [cotangents_at(output, edges, ones, keep_graph=keep_graph)]
        found = []
        self.subject.backwards.add(Purpose.COMPONENTS, arrangement.components)
        for k in range(arrangement.components):
            unit = torch.zeros(arrangement.poses, arrangement.components, device="cpu")
            unit[:, k] = 1
            cotangent = arrangement.join(unit).reshape(output.shape)
            found.append(cotangents_at(output, edges, cotangent.to(output.device, output.dtype)))
        return found

    def _layouts(
        self, work: Worklist, columns: list[list[Tensor | None]]
    ) -> list[Layout | None] | None:
        """Whose the rows are, by the numbers that picked them; None if these do not tell."""
        shared: list[Layout] = []
        found: list[Layout | None] = []
        for edge, *values in zip(work.edges, *columns, strict=True):
            value = next((v for v in values if v is not None), None)
            layout = known_layout(self.subject, work.arrangement, edge, value, shared)
            strays = layout is not None and any(
                v is not None and layout.has_strays(v) for v in values[1:]
            )
            if layout is None or strays:
                return None
            found.append(layout)
        return found

    def multiplied(
        self,
        work: Worklist,
        forms: Forms,
        tables: Tables,
        looked: Looked,
    ) -> Parts:
        """The parts of the parameters that are read, use by use; cotangents are dropped on the way.

        Args:
            work: What to read.
            forms: The closed form of each use.
            tables: Those that rows were looked up in, by operator.
            looked: The cotangents.
        """
        found: Parts = {use.site.parameter: [] for use in work.uses}
        far: list[tuple[Site, Far]] = []
        reached: dict[tuple[int, int, bool, bool], Far | None] = {}
        for use, form in zip(work.uses, forms, strict=True):
            site = use.site
            if site.parameter in self.watched - self.flowing and looked.flows(use.places):
                self.flowing.add(site.parameter)
            if site.direct or site.light:
                part = self._part(work, use, form, looked)
                found[site.parameter] += [] if part is None else [part]
            else:
                key = site.node, site.argument, site.transposed, site.closed
                if key not in reached:
                    reached[key] = self._far(work, use, form, looked)
                rows = reached[key]
                far += [] if rows is None else [(site, rows)]
            for place in use.spent:
                self._answers.pop(site.node, None)
                self._insides.pop(site.node, None)
                for column in looked.columns:
                    column[place] = None
        if far:
            for name, part in pulled(self.subject, far, tables, work.arrangement, self._most):
                found[name].append(part)
        return found

    def _part(
        self, work: Worklist, use: Use, form: ClosedForm | None, looked: Looked
    ) -> Part | None:
        """The part of a parameter that enters as it is, or rearranged."""
        site, arrangement = use.site, work.arrangement
        served = self._served(use, form, looked)
        if served is None:
            rows = self._operator_rows(work, use, form, looked)
            if rows is None:
                return None
            pull = self._pull(site)
            values = rows.rows if pull is None else pull.back(rows.rows)
            return Rows(rows.path, 0, values.to(self.subject.parameters[site.parameter].dtype))
        form, layout, each = served
        if not each:
            return None
        if site.direct:
            return Factors.direct(form, layout, arrangement, each)
        path = f"closed form ({type(form).__name__})"
        return Factors(path, 0, form, layout, arrangement, each, self._pull(site))

    def _far(self, work: Worklist, use: Use, form: ClosedForm | None, looked: Looked) -> Far | None:
        """The rows of a tensor that was computed from parameters."""
        served = self._served(use, form, looked)
        if served is None:
            return self._operator_rows(work, use, form, looked)
        form, layout, each = served
        if not each:
            return None
        path = f"closed form ({type(form).__name__}) of a computed weight"
        if use.site.source[0] in work.recipe.activations:
            path = "rows of activations: poses mix"
        return Far(path, Factors(path, 0, form, layout, work.arrangement, each).rows())

    def _served(
        self, use: Use, form: ClosedForm | None, looked: Looked
    ) -> tuple[ClosedForm, Layout, tuple[Tensor, ...]] | None:
        """A form, the cotangents that it takes, of all components, and whose their rows are.

        Returns:
            None if the form does not serve; no cotangents if nothing flows.
        """
        if form is None:
            return None
        place = use.places[0]
        if use.opens is None:
            layout, values = looked.layouts[place], [column[place] for column in looked.columns]
        else:
            layout, values = self._opened(use.opens, use, looked)
        if layout is None:
            return None
        each = _filled(values)
        if each and layout.dims and not form.accepts(each[0].shape, layout):
            return None
        return form, layout, each

    def _opened(
        self, opens: Opening, use: Use, looked: Looked
    ) -> tuple[Layout | None, list[Tensor | None]]:
        """The cotangents of a product inside an operator, by those of its outputs."""
        node = use.site.node
        if node not in self._insides:
            numbers = range(len(self.registry.sizes[node]))
            places = {i: place for place, (_, i) in zip(use.places, use.site.edges, strict=True)}
            found: list[Tensor | None] = []
            for column in looked.columns:
                values = [column[places[i]] if i in places else None for i in numbers]
                flows = any(value is not None for value in values)
                found.append(opens.cotangents(self._operators[node], values) if flows else None)
            live = {
                i: looked.layouts[place]
                for i, place in places.items()
                if any(column[place] is not None for column in looked.columns)
            }
            self._insides[node] = opens.layout(live), found
        return self._insides[node]

    def _operator_rows(
        self, work: Worklist, use: Use, form: ClosedForm | None, looked: Looked
    ) -> Far | None:
        """The rows of one operator's own vjp, one masked cotangent for each."""
        site, arrangement = use.site, work.arrangement
        node, sizes = self.registry.nodes[site.node], self.registry.sizes[site.node]
        dtypes, device = dtype_of(node), self.subject.output.device

        def masked(row: int) -> list[Tensor | None]:
            pose, k = divmod(row, arrangement.components)
            values: list[Tensor | None] = [None] * len(sizes)
            for place, (_, i) in zip(use.places, site.edges, strict=True):
                value, layout = looked.columns[k][place], looked.layouts[place]
                if value is not None and layout is not None:
                    values[i] = layout.only(value, pose)
                else:
                    values[i] = torch.zeros(sizes[i], dtype=dtypes[i], device=device)
            return values

        self.declined.add(site)
        answers = self._answers.setdefault(site.node, {})
        if site.argument not in answers:
            alike = [s for s in work.recipe.sites if s.node == site.node and not s.closed]
            sources = {s.argument: s.source for s in (site, *alike)}
            held = sum(prod(sizes[i]) for _, i in site.edges)
            held += 2 * sum(self.registry.shape(source).numel() for source in sources.values())
            count = arrangement.shape.numel()
            found = node_rows(node, [*sources], masked, count, self._most(held))
            answers.update({argument: found.get(argument) for argument in sources})
        rows = answers[site.argument]
        if rows is None:
            return None
        each = rows.reshape(arrangement.poses, arrangement.components, *rows.shape[1:])
        rows = arrangement.join(each)
        why = self._why_not_closed(work, use, form, looked)
        return Far(
            f"operator vjp ({named(node.name())}): {why}", rows.mT if site.transposed else rows
        )

    def _why_not_closed(
        self, work: Worklist, use: Use, form: ClosedForm | None, looked: Looked
    ) -> str:
        site, layout = use.site, looked.layouts[use.places[0]]
        if layout is not None and not bool((layout.owners != NOBODY).any()):
            return "no gradient flows"
        if site.source[0] in work.recipe.activations and not (site.direct or site.light):
            return "poses mix"
        if form is not None:
            return "no closed form for this layout"
        if site.argument not in kind_of(self.registry.names[site.node]).forms:
            return "no closed form"
        return "no closed form of this use" if site.closed else "disagreed with autograd"

    def _pull(self, site: Site) -> Pull | None:
        """From rows of a rearranged parameter to rows of the parameter."""
        if site.direct:
            return None
        (edge,) = self.registry.at([site.source])
        dtype = dtype_of(edge.node)[edge.output_nr]
        parameter = self.subject.parameters[site.parameter]
        if self._is_viewed(site):
            return Pull(lambda rows: rows.reshape(len(rows), *parameter.shape), keeps=True)
        most = self._most(2 * parameter.numel())

        def back(rows: Tensor) -> Tensor:
            (found,) = rows_of_graph(
                [edge],
                lambda i, j: [rows[i:j].to(dtype)],
                [parameter],
                len(rows),
                most,
                is_sure=True,  # what lies between only rearranges
            )
            return rows.new_zeros(len(rows), *parameter.shape) if found is None else found

        return Pull(back, keeps=self.registry.shape(site.source).numel() == parameter.numel())

    def _is_viewed(self, site: Site) -> bool:
        """Whether a rearranged parameter has its numbers in their order: it only has another shape.

        Hooks of the user's may lie between, which a backward runs.
        """
        number = site.source[0]
        leaf = self.registry.leaves[id(self.subject.parameters[site.parameter])]
        while number != leaf and kind_of(self.registry.names[number]).moves is viewed:
            (source,) = self.registry.sources[number]
            if source is None:
                return False
            number = source[0]
        return number == leaf and not self.subject.is_hooked

    def _together(self, settled: SettledWorklist) -> Parts | None:
        """One backward of all numbers of the output together; None if it cannot be batched."""
        output, parameters = self.subject.output, self.subject.parameters
        count = output.numel()
        units = torch.eye(count, dtype=output.dtype, device=output.device)
        units, leaves = units.reshape(count, *output.shape), [*parameters.values()]
        found = rows_together(output, units, leaves, is_sure=settled.is_sure)
        if found is None:
            return None
        recipe, parts = settled.work.recipe, Parts()
        mixed = dict.fromkeys(slow_parameters(recipe), "poses mix") | {**recipe.by_rows}
        for name, rows in zip(parameters, found, strict=True):
            why = mixed.get(name, "few numbers")
            path = f"rows of the whole graph: {why}"
            parts[name] = [] if rows is None else [Rows(path, 0, rows)]
        return parts

    def _by_rows(self, reasons: Mapping[str, str]) -> Parts:
        """One backward through the whole graph for every number of the output."""
        if not reasons:
            return {}
        names, output = sorted(reasons), self.subject.output
        targets = [self._target(name) for name in names]

        def units(start: int, stop: int) -> list[Tensor]:
            cotangents = output.new_zeros(stop - start, output.numel())
            cotangents.diagonal(start).fill_(1)
            return [cotangents.reshape(-1, *output.shape)]

        self.subject.backwards.add(Purpose.ROWS, output.numel())
        sources = [source for source, _ in targets]
        apart = self._put_together()
        if apart is None:
            found = rows_of_graph([output], units, sources, output.numel(), self._at_once(names))
        else:
            beside = None if self.registry.has_python() else self.subject.beside
            found, sums = rows_of_each(apart, sources, () if beside is None else beside.leaves)
            if beside is not None:
                beside.gradients = sums  # on the way; functions of Python need a guard there
        parts: Parts = {}
        for name, (_, table), rows in zip(names, targets, found, strict=True):
            path = f"rows of the whole graph: {reasons[name]}"
            if rows is None:
                parts[name] = []
            elif table is None:
                parts[name] = [Rows(path, 0, rows)]
            else:
                parts[name] = [entries(path, table, rows, Arrangement(output.shape, None))]
        return parts

    def _put_together(self) -> list[GradientEdge | None] | None:
        """The numbers that the output was put together of, one after another; None if it was not.

        Each has a graph of its own, in which the others' part costs nothing.
        """
        registry, output = self.registry, self.subject.output
        sources = registry.sources[0]
        if not kind_of(registry.names[0]).cuts or not 1 < len(sources) == output.numel():
            return None
        present = [edge for edge in sources if edge is not None]
        if any(prod(registry.sizes[node][i]) != 1 for node, i in present):
            return None
        if is_listened_to(output):  # its hooks see the gradients of all
            return None
        edges = iter(registry.at(present))
        return [None if edge is None else next(edges) for edge in sources]

    def _target(self, name: str) -> tuple[Tensor | GradientEdge, Embedding | None]:
        """By which tensor rows of the whole graph are taken; its table too, if it was looked up."""
        registry, parameter = self.registry, self.subject.parameters[name]
        if self._looks_up:
            uses = [*uses_of(self.subject, name)]
            if len(uses) == 1 and looks_up(registry, uses[0]):
                operator = operator_at(registry, uses[0].node)
                table = None if is_packed(operator.node) else lifted(operator, parameter, uses[0])
                (edge,) = registry.at([(uses[0].node, 0)])
                return (parameter if table is None else edge), table
        return parameter, None

    @cached_property
    def _looks_up(self) -> bool:
        """Whether there may be tables in which rows are looked up."""
        names = set(self.registry.names)
        return not self.registry.is_nested and any(kind_of(name).looks_up for name in names)

    def _at_once(self, names: Sequence[str]) -> int:
        """How many rows of the whole graph to take at once.

        One after another, where operators are large or take cotangents one by one: then nothing is
        gained by batching them.
        """
        registry = self.registry
        held = sum(self.subject.parameters[name].numel() for name in names)
        if registry.is_nested:
            return self._most(held)
        numbers = sum(
            prod(shape)
            for name, sizes in zip(registry.names, registry.sizes, strict=True)
            for shape in sizes
            if name != LEAF_NAME
        )
        alone = any(kind_of(name).is_unbatched for name in registry.names)
        return 1 if alone or numbers > _LARGE * len(registry.nodes) else self._most(held + numbers)

    def _most(self, numbers: int) -> int:
        """How many rows of so many numbers may be in memory at once."""
        return max(1, self.block_bytes // (8 * max(numbers, 1)))

    @property
    def registry(self) -> EdgeRegistry:
        """The graph."""
        return self.subject.registry


def _filled(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Cotangents of all components, with zeros for None; empty if nothing flows in any."""
    present = [value for value in values if value is not None]
    if not present or len(present) == len(values):
        return tuple(present)
    return tuple([torch.zeros_like(present[0]) if v is None else v for v in values])
