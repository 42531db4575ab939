"""From rows of a tensor that was computed from parameters to rows of the parameters.

Such tensors are learned positions, weights under a norm or a low-rank update, biases looked up by
distance. Poses share them, so their rows are read where they meet the poses, and pulled back to the
parameters from there.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, final

from torch import Tensor
from torch.autograd.graph import GradientEdge

from posegrad._torch import dtype_of, shape_of
from posegrad.graph._edges import Edge, EdgeRegistry
from posegrad.graph._operators import kind_of
from posegrad.graph._read import Entry, Operator, form_of
from posegrad.graph._sites import Site
from posegrad.graph._subject import Subject
from posegrad.graph._vjp import rows_of_graph
from posegrad.jacobian import Arrangement, Factor, Factors, Layout, Part, Purpose, Rows
from posegrad.jacobian.layers import Embedding

__all__ = ["Far", "entries", "lifted", "pulled", "pulls"]


@final
class Far(NamedTuple):
    """Rows of a tensor that was computed from parameters.

    Args:
        path: How they were found, for reports.
        rows: `[M, *shape]`.
    """

    path: str
    rows: Tensor


def lifted(operator: Operator, parameter: Tensor, site: Site) -> Embedding | None:
    """A parameter as the table in which an operator looked up rows; None if no form can be read."""
    reader = kind_of(operator.node.name()).forms[0]
    form = form_of(reader, operator, Entry(parameter.shape, False, site.parameter))
    return form if isinstance(form, Embedding) else None


def pulled(
    subject: Subject,
    far: Sequence[tuple[Site, Far]],
    tables: Mapping[int, Embedding | None],
    arrangement: Arrangement,
    most: Callable[[int], int],
) -> Iterator[tuple[str, Part]]:
    """The parts of the parameters.

    Rows are pulled back to what was looked up in a table, not to the table: looking up has a closed
    form of its own, in which every row of the Jacobian has the same indices.

    Args:
        subject: What is differentiated; its graph is kept.
        far: The sites, and the rows of what enters at each.
        tables: The tables that rows were looked up in, by operator; None if no form can be read.
        arrangement: The poses in the output.
        most: From the size of a row to how many such rows may be in memory at once.
    """
    rows = {_use(site): one for site, one in far}
    read = {node for node, table in tables.items() if table is not None}
    goals = _goals(subject, [site for site, _ in far], read)
    for group in _together(subject.registry, goals):
        for goal, found in zip(group, _back(subject, group, rows, most), strict=True):
            table = None if goal.table is None else tables[goal.table]
            if found is None:
                continue
            if table is not None:
                yield goal.name, entries("closed form (Embedding)", table, found, arrangement)
            else:
                path = ", ".join(dict.fromkeys(rows[use].path for use in goal.uses))
                yield goal.name, Rows(path, 0, found.to(subject.parameters[goal.name].dtype))


def pulls(subject: Subject, sites: Sequence[Site]) -> int:
    """How often rows will be pulled back, if all tables can be read."""
    far = [site for site in sites if not (site.direct or site.light)]
    read = {site.looked_up for site in far if site.looked_up is not None}
    groups = _together(subject.registry, _goals(subject, far, read))
    return sum(bool(_beyond(group)) for group in groups)


_Use = tuple[int, int, bool, bool]
"""A use of one tensor: operator, argument, transposed, closed. Sites of several parameters may
share a use, and then share its rows."""


@final
class _Goal(NamedTuple):
    """A tensor that rows are pulled back to.

    Args:
        name: The parameter that it is, or of which it is some rows.
        table: The operator that looked these rows up; None if it is the parameter.
        edge: The tensor.
        uses: The uses whose rows are pulled back to it, and the tensor that each is a use of.
    """

    name: str
    table: int | None
    edge: Edge
    uses: dict[_Use, Edge]

    def of(self, source: Edge) -> set[_Use]:
        """The uses of one tensor."""
        return {use for use, edge in self.uses.items() if edge == source}


def _use(site: Site) -> _Use:
    return site.node, site.argument, site.transposed, site.closed


def _goals(subject: Subject, far: Sequence[Site], tables: Collection[int]) -> list[_Goal]:
    """What rows that were read far from the parameters are pulled back to.

    Args:
        subject: What is differentiated.
        far: Where they were read.
        tables: The operators whose tables can be read.
    """
    goals: dict[tuple[str, int | None], _Goal] = {}
    for site in far:
        table = site.looked_up if site.looked_up in tables else None
        key = site.parameter, table
        if key not in goals:
            parameter = subject.parameters[site.parameter]
            leaf = subject.registry.leaves[id(parameter)]
            goals[key] = _Goal(*key, (leaf if table is None else table, 0), {})
        goals[key].uses[_use(site)] = site.source
    return list(goals.values())


def _together(registry: EdgeRegistry, goals: Sequence[_Goal]) -> list[list[_Goal]]:
    """The goals in groups, each reached by one backward from all tensors of the group at once.

    A goal may not lie behind a tensor whose rows it does not take: it has taken them at a nearer
    tensor, and would count them twice.
    """
    behind = {edge: registry.below(edge[0]) for goal in goals for edge in goal.uses.values()}

    def fits(goal: _Goal, other: _Goal) -> bool:
        return all(
            goal.of(source) == other.of(source)
            if source in goal.uses.values()
            else goal.edge[0] not in behind[source]
            for source in other.uses.values()
        )

    groups: list[list[_Goal]] = []
    for goal in goals:
        for group in groups:
            if all(fits(goal, other) and fits(other, goal) for other in group):
                group.append(goal)
                break
        else:
            groups.append([goal])
    return groups


def _beyond(group: Sequence[_Goal]) -> dict[_Use, Edge]:
    """The uses from which a backward has a way to go: those of tensors that are no goals."""
    ends = {goal.edge for goal in group}
    return {u: edge for goal in group for u, edge in goal.uses.items() if edge not in ends}


def entries(path: str, table: Embedding, rows: Tensor, arrangement: Arrangement) -> Part:
    """The part of a table by rows `[M, ...]` of what was looked up in it.

    Args:
        path: How they were found.
        table: How it was looked up, which is the same for all rows.
        rows: The rows.
        arrangement: The poses in the output.
    """
    indices = table.indices.value
    repeated = indices.expand(arrangement.poses, *indices.shape)
    form = replace(table, indices=Factor.of(repeated, table.indices.beside))
    layout = Layout.regular(arrangement.poses, 0, arrangement.poses, 1, rows.device)
    cotangents = arrangement.split(rows).unbind(1)
    return Factors(path, 0, form, layout, arrangement, cotangents)


def _back(
    subject: Subject,
    group: Sequence[_Goal],
    rows: Mapping[_Use, Far],
    most: Callable[[int], int],
) -> list[Tensor | None]:
    """The rows of each goal, from those of all their uses, through what lies between."""
    far = _summed(rows, _beyond(group))
    edges = subject.registry.at(far)
    dtypes = [dtype_of(edge.node)[edge.output_nr] for edge in edges]
    values = [one.to(dtype) for one, dtype in zip(far.values(), dtypes, strict=True)]
    found: list[Tensor | None] = [None] * len(group)
    if values:
        targets: list[Tensor | GradientEdge] = [
            subject.parameters[goal.name]
            if goal.table is None
            else subject.registry.at([goal.edge])[0]
            for goal in group
        ]
        count = len(values[0])
        subject.backwards.add(Purpose.PULLS, count)
        held = sum(value[0].numel() for value in values) + sum(map(_numbers, targets))

        def batch(start: int, stop: int) -> list[Tensor]:
            return [value[start:stop] for value in values]

        is_sure = _is_sure(subject.registry, far, [goal.edge for goal in group])
        found = rows_of_graph(edges, batch, targets, count, most(2 * held), is_sure=is_sure)
    for place, goal in enumerate(group):
        own = _summed(rows, {use: edge for use, edge in goal.uses.items() if edge == goal.edge})
        if own:
            near, beyond = own[goal.edge], found[place]
            found[place] = near if beyond is None else near + beyond
    return found


def _is_sure(registry: EdgeRegistry, far: Iterable[Edge], goals: Sequence[Edge]) -> bool:
    """Whether all that lies between is known to treat a batch as it treats each entry of it."""
    between = set[int]().union(*(registry.below(source[0]) for source in far))
    beyond = set[int]().union(*(registry.below(goal[0]) for goal in goals))
    return all(kind_of(registry.names[node]).is_surely_batched for node in between - beyond)


def _summed(rows: Mapping[_Use, Far], uses: Mapping[_Use, Edge]) -> dict[Edge, Tensor]:
    """The rows of each tensor, over all its uses."""
    total: dict[Edge, Tensor] = {}
    for use, edge in uses.items():
        one = rows[use].rows
        total[edge] = total[edge] + one if edge in total else one
    return total


def _numbers(target: Tensor | GradientEdge) -> int:
    if isinstance(target, Tensor):
        return target.numel()
    return shape_of(target.node)[target.output_nr].numel()
