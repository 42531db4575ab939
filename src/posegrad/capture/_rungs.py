"""The ladder: closed forms, the vjp of one operator, rows of the whole graph."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from posegrad._compat import dtype_of, in_backward, is_packed
from posegrad.capture._edges import Edge, EdgeRegistry
from posegrad.capture._operators import kind_of
from posegrad.capture._read import Entry, Operator, Reader
from posegrad.capture._recipe import Recipe, named
from posegrad.capture._sites import Site
from posegrad.capture._trial import Subject, Trial
from posegrad.capture._vjp import cotangents_at, node_rows, rows_of_graph
from posegrad.jacobian import NOBODY, Arrangement, ClosedForm, Factors, Layout, Part, Pull, Rows

__all__ = ["Parts", "Reading", "by_size", "entry_of", "operator_at"]

Parts = dict[str, list[Part]]

Cotangents = list[dict[Edge, Tensor | None]]
"""For each component of the output the cotangents, by edge."""


@dataclass(frozen=True)
class Reading:
    """One Jacobian being read.

    Args:
        subject: What is differentiated.
        parameters: By name; the output depends on each.
        block_bytes: About how much memory rows without a closed form may take at once.
    """

    subject: Subject
    parameters: Mapping[str, Tensor]
    block_bytes: int
    _answers: dict[int, dict[int, Tensor | None]] = field(default_factory=dict)  # node, argument

    def parts(self, recipe: Recipe, trial: Trial) -> Parts:
        """Reads all sites, then takes the rows that cannot be read; uses the trial up."""
        arrangement = Arrangement(self.subject.output.shape, recipe.dim)
        forms = self._forms(recipe.sites)
        found: Parts = {name: [] for name in self.parameters}
        cotangents = self._cotangents(arrangement, recipe.sites, trial)
        waiting = Counter(edge for site in recipe.sites for edge in site.edges)
        self._answers.clear()
        for site in by_size(self.registry, recipe.sites):
            part = self._part(site, forms.pop(site), recipe, trial, cotangents)
            found[site.parameter] += [] if part is None else [part]
            waiting.subtract(site.edges)
            for edge in site.edges:
                if not waiting[edge]:
                    self._answers.pop(site.node, None)
                    for component in cotangents:
                        component.pop(edge)
        found.update(self._by_rows(recipe.by_rows))
        return found

    def _forms(self, sites: Sequence[Site]) -> dict[Site, ClosedForm | None]:
        """Reads what the operators saved, all in one go: a checkpoint recomputes but once."""
        forms: dict[Site, ClosedForm | None] = dict.fromkeys(sites)
        numbers = {site.node for site in sites if site.closed}
        operators = {number: operator_at(self.registry, number) for number in numbers}

        def read_all() -> None:
            for site in sites:
                if site.closed:
                    entry = entry_of(self.registry, site)
                    operator = operators[site.node]
                    if not operator.dtype.is_complex:  # the formulas are those of real numbers
                        forms[site] = self._reader(site)(operator, entry)

        if any(is_packed(operator.node) for operator in operators.values()):
            in_backward(read_all)
        else:
            read_all()
        return forms

    def _cotangents(
        self, arrangement: Arrangement, sites: Sequence[Site], trial: Trial
    ) -> Cotangents:
        """The cotangents of each component, by edge."""
        if arrangement.components == 1:
            return [trial.cotangents]
        edges = list(dict.fromkeys(edge for site in sites for edge in site.edges))
        found: Cotangents = []
        for k in range(arrangement.components if edges else 0):
            unit = torch.zeros(arrangement.poses, arrangement.components, device="cpu")
            unit[:, k] = 1
            output = self.subject.output
            cotangent = arrangement.join(unit).reshape(output.shape)
            values = cotangents_at(
                output, self.registry.at(edges), cotangent.to(output.device, output.dtype)
            )
            found.append(dict(zip(edges, values, strict=True)))
        return found

    def _part(
        self,
        site: Site,
        form: ClosedForm | None,
        recipe: Recipe,
        trial: Trial,
        cotangents: Cotangents,
    ) -> Part | None:
        arrangement, edge = Arrangement(self.subject.output.shape, recipe.dim), (site.node, 0)
        layout = trial.layouts.get(edge)
        values = [found.get(edge) for found in cotangents]
        present = [value for value in values if value is not None]
        if (
            form is None
            or layout is None
            or (present and layout.dims and not form.accepts(present[0].shape, layout))
        ):
            why = self._why_not_closed(site, form, layout, recipe)
            return self._operator_rows(site, recipe, trial, cotangents, why)
        if not present:
            return None
        each = tuple(torch.zeros_like(present[0]) if v is None else v for v in values)
        if site.direct:
            return Factors.direct(form, layout, arrangement, each)
        path = f"closed form ({type(form).__name__})"
        if not site.light:
            computed = site.source[0] in recipe.activations
            path = "rows of activations: poses mix" if computed else f"{path} of a computed weight"
        factors = Factors(path, 0, form, layout, arrangement, each, self._pull(site))
        return factors if site.light else Rows(path, 0, self._narrow(site, factors.rows()))

    def _operator_rows(
        self,
        site: Site,
        recipe: Recipe,
        trial: Trial,
        cotangents: Cotangents,
        why: str,
    ) -> Part | None:
        """The rows of one operator's own vjp, one masked cotangent for each."""
        arrangement = Arrangement(self.subject.output.shape, recipe.dim)
        node = self.registry.nodes[site.node]
        edges, sizes = site.edges, self.registry.sizes[site.node]

        def masked(row: int) -> list[Tensor | None]:
            pose, k = divmod(row, arrangement.components)
            values: list[Tensor | None] = [None] * len(sizes)
            for edge in edges:
                value, layout = cotangents[k][edge], trial.layouts[edge]
                if value is not None and layout is not None:
                    values[edge[1]] = layout.only(value, pose)
                else:
                    values[edge[1]] = torch.zeros(
                        sizes[edge[1]],
                        dtype=dtype_of(node)[edge[1]],
                        device=self.subject.output.device,
                    )
            return values

        answers = self._answers.setdefault(site.node, {})
        if site.argument not in answers:
            alike = [s for s in recipe.sites if s.node == site.node and not s.closed]
            sources = {s.argument: s.source for s in (site, *alike)}
            held = sum(prod(sizes[i]) for _, i in edges)
            held += 2 * sum(self.registry.shape(source).numel() for source in sources.values())
            count = arrangement.shape.numel()
            found = node_rows(node, [*sources], masked, count, self._most(held))
            answers.update({argument: found.get(argument) for argument in sources})
        rows = answers[site.argument]
        if rows is None:
            return None
        each = rows.reshape(arrangement.poses, arrangement.components, *rows.shape[1:])
        rows = arrangement.join(each)
        if site.transposed:
            rows = rows.mT
        pull = self._pull(site)
        rows = rows if pull is None else pull(rows)
        path = f"operator vjp ({named(node.name())}): {why}"
        return Rows(path, 0, self._narrow(site, rows))

    def _why_not_closed(
        self, site: Site, form: ClosedForm | None, layout: Layout | None, recipe: Recipe
    ) -> str:
        if layout is not None and not bool((layout.owners != NOBODY).any()):
            return "no gradient flows"
        if site.source[0] in recipe.activations and not site.light:
            return "poses mix"
        if form is not None:
            return "no closed form for this layout"
        if site.argument not in kind_of(self.registry.names[site.node]).forms:
            return "no closed form"
        return "no closed form of this use" if site.closed else "disagreed with autograd"

    def _pull(self, site: Site) -> Pull | None:
        """From rows of the tensor that entered to rows of the parameter it was computed from."""
        if site.direct:
            return None
        (edge,) = self.registry.at([site.source])
        dtype = dtype_of(edge.node)[edge.output_nr]
        parameter = self.parameters[site.parameter]
        most = self._most(2 * parameter.numel())

        def pull(rows: Tensor) -> Tensor:
            (found,) = rows_of_graph(
                edge, lambda i: rows[i].to(dtype), [parameter], len(rows), most
            )
            return rows.new_zeros(len(rows), *parameter.shape) if found is None else found

        return pull

    def _by_rows(self, reasons: Mapping[str, str]) -> Parts:
        """One backward through the whole graph for every number of the output."""
        if not reasons:
            return {}
        names, output = sorted(reasons), self.subject.output
        sources = [self.parameters[name] for name in names]
        held = sum(p.numel() for p in sources)
        if not self.registry.is_nested():
            held += sum(prod(shape) for sizes in self.registry.sizes for shape in sizes)

        def unit(row: int) -> Tensor:
            cotangent = torch.zeros_like(output).reshape(-1)
            cotangent[row] = 1
            return cotangent.reshape(output.shape)

        found = rows_of_graph(output, unit, sources, output.numel(), self._most(held))
        rung = "rows of the whole graph"
        return {
            name: [] if rows is None else [Rows(f"{rung}: {reasons[name]}", 0, rows)]
            for name, rows in zip(names, found, strict=True)
        }

    def _reader(self, site: Site) -> Reader:
        return kind_of(self.registry.names[site.node]).forms[site.argument]

    def _narrow(self, site: Site, rows: Tensor) -> Tensor:
        return rows.to(self.parameters[site.parameter].dtype)

    def _most(self, numbers: int) -> int:
        """How many rows of so many numbers may be in memory at once."""
        return max(1, self.block_bytes // (8 * max(numbers, 1)))

    @property
    def registry(self) -> EdgeRegistry:
        """The graph."""
        return self.subject.registry


def operator_at(registry: EdgeRegistry, node: int) -> Operator:
    """The operator of a node, as its forms are read from it."""
    return Operator(registry.nodes[node], registry.sizes[node][0], registry.dtypes[node][0], {})


def entry_of(registry: EdgeRegistry, site: Site) -> Entry:
    """How the parameter enters at a site."""
    return Entry(registry.shape(site.source), site.transposed, site.parameter)


def by_size(registry: EdgeRegistry, sites: Iterable[Site]) -> list[Site]:
    """Those with small cotangents first: once these are read, there is room for large ones."""
    return sorted(sites, key=lambda site: max(registry.shape(e).numel() for e in site.edges))
