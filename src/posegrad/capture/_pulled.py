"""From rows of a tensor that was computed from parameters to rows of the parameters.

Learned positions, weights under a norm or a low-rank update, biases looked up by distance: poses
share such a tensor, so their rows are read where it meets the poses, and pulled back from there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge

from posegrad._compat import dtype_of, shape_of
from posegrad.capture._edges import Edge
from posegrad.capture._operators import kind_of
from posegrad.capture._read import Entry, Operator, form_of
from posegrad.capture._sites import Site
from posegrad.capture._subject import Subject
from posegrad.capture._vjp import rows_of_graph
from posegrad.jacobian import Arrangement, Factor, Factors, Layout, Part, Purpose, Rows
from posegrad.jacobian.layers import Embedding

__all__ = ["Far", "entries", "lifted", "pulled", "pulls"]


class Far(NamedTuple):
    """Rows of a tensor that was computed from parameters.

    Args:
        path: How they were found, for reports.
        rows: `[M, *shape]`.
    """

    path: str
    rows: Tensor


def lifted(operator: Operator, parameter: Tensor, site: Site) -> Embedding | None:
    """The table that a parameter is to an operator that looked up rows of it."""
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

    Parameters of one tensor are pulled back to together. A table is not: that rows were looked up
    in it is a closed form of its own, in which every row of the Jacobian has the same indices.

    Args:
        subject: What is differentiated; its graph is kept.
        far: The sites, and the rows of what enters at each.
        tables: Those that rows were looked up in, by operator.
        arrangement: The poses in the output.
        most: How many rows of so many numbers may be in memory at once.
    """
    reached: dict[tuple[str, int | None], list[tuple[Site, Far]]] = {}
    for site, rows in far:
        at = site.looked_up
        table = None if at is None or tables[at] is None else at
        reached.setdefault((site.parameter, table), []).append((site, rows))
    alike: dict[tuple[int, ...], list[str]] = {}
    for (name, table), own in reached.items():
        if table is None:
            alike.setdefault(tuple([id(rows) for _, rows in own]), []).append(name)
    for names in alike.values():
        own = reached[names[0], None]
        sources = [subject.parameters[name] for name in names]
        found = _back(subject, _summed(own), sources, most)
        for name, source, values in zip(names, sources, found, strict=True):
            if values is not None:
                yield name, Rows(_path(own), 0, values.to(source.dtype))
    for (name, table), own in reached.items():
        if table is not None and (form := tables[table]) is not None:
            yield name, _entries(subject, own, table, form, arrangement, most)


def pulls(sites: Sequence[Site]) -> int:
    """How often rows will be pulled back, if all tables can be read."""
    alike: dict[tuple[str, int | None], list[Site]] = {}
    for site in sites:
        if not (site.direct or site.light):
            alike.setdefault((site.parameter, site.looked_up), []).append(site)
    groups = {
        tuple([(s.node, s.argument, s.transposed, s.closed) for s in own])
        for (_, table), own in alike.items()
        if table is None
    }
    behind = [
        own
        for (_, table), own in alike.items()
        if table is not None and any(site.source != (table, 0) for site in own)
    ]
    return len(groups) + len(behind)


def _entries(
    subject: Subject,
    own: Sequence[tuple[Site, Far]],
    node: int,
    table: Embedding,
    arrangement: Arrangement,
    most: Callable[[int], int],
) -> Part:
    """The part of a table, from rows of what was looked up in it, or of what that became."""
    edge, rows = (node, 0), _summed(own)
    total = rows.pop(edge, None)
    if rows:
        (found,) = _back(subject, rows, subject.registry.at([edge]), most)
        assert found is not None
        total = found if total is None else total + found
    assert total is not None
    return entries("closed form (Embedding)", table, total, arrangement)


def entries(path: str, table: Embedding, rows: Tensor, arrangement: Arrangement) -> Part:
    """The part of a table by rows `[M, ...]` of what was looked up in it.

    Args:
        path: How they were found.
        table: How it was looked up: alike for all rows.
        rows: The rows.
        arrangement: The poses in the output.
    """
    indices = table.indices.value
    repeated = indices.expand(arrangement.poses, *indices.shape)
    form = replace(table, indices=Factor.of(repeated, table.indices.beside))
    layout = Layout.regular(arrangement.poses, 0, arrangement.poses, 1, rows.device)
    cotangents = arrangement.split(rows).unbind(1)
    return Factors(path, 0, form, layout, arrangement, cotangents)


def _summed(own: Sequence[tuple[Site, Far]]) -> dict[Edge, Tensor]:
    """The rows of each tensor, over all its uses."""
    total: dict[Edge, Tensor] = {}
    for site, (_, rows) in own:
        total[site.source] = total[site.source] + rows if site.source in total else rows
    return total


def _back(
    subject: Subject,
    rows: Mapping[Edge, Tensor],
    targets: Sequence[Tensor | GradientEdge],
    most: Callable[[int], int],
) -> list[Tensor | None]:
    """Rows of tensors of the graph, pulled back through what lies between."""
    edges = subject.registry.at(rows)
    dtypes = [dtype_of(edge.node)[edge.output_nr] for edge in edges]
    values = [one.to(dtype) for one, dtype in zip(rows.values(), dtypes, strict=True)]
    count = len(values[0])
    subject.backwards.add(Purpose.PULLS, count)
    held = sum(value[0].numel() for value in values) + sum(map(_numbers, targets))

    def batch(start: int, stop: int) -> list[Tensor]:
        return [value[start:stop] for value in values]

    return rows_of_graph(edges, batch, targets, count, most(2 * held))


def _numbers(target: Tensor | GradientEdge) -> int:
    if isinstance(target, Tensor):
        return target.numel()
    return shape_of(target.node)[target.output_nr].numel()


def _path(own: Sequence[tuple[Site, Far]]) -> str:
    return ", ".join(dict.fromkeys(rows.path for _, rows in own))
