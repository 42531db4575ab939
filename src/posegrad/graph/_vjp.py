"""Vector-Jacobian products below the closed forms: of one operator, and of the whole graph."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from posegrad._restoring import Change, leaf_hooks_off, ordinary_mode
from posegrad._torch import backward_to, copy_each, device_of, dtype_of, shape_of
from posegrad.graph._alone import apply_node

__all__ = [
    "as_source",
    "cotangents_at",
    "dense",
    "node_rows",
    "rows_of_each",
    "rows_of_graph",
    "rows_together",
]

_VMAP_LEFT = (
    ".*performance drop.*batching rule.*",
    ".*There is a performance drop.*",
)


def cotangents_at(
    output: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, *, keep_graph: bool = True
) -> list[Tensor | None]:
    """One backward from the output to the edges and no further.

    No parameter's gradient is computed on the way.
    """
    found = backward_to(output, edges, cotangent, keep_graph=keep_graph)
    # A hook, or an operator written over in place, may hand on a tensor with a graph.
    return [None if g is None else dense(g.detach() if g.requires_grad else g) for g in found]


def node_rows(
    node: Node,
    arguments: Sequence[int],
    cotangents: Callable[[int], list[Tensor | None]],
    count: int,
    most: int,
) -> dict[int, Tensor]:
    """One operator's gradients for some arguments, one for each of `count` cotangents.

    An operator computes all of them together, whichever is asked for.

    Args:
        node: The operator.
        arguments: The arguments.
        cotangents: Row number to the cotangents of the operator's outputs, None where unused.
        count: The number of rows.
        most: How many rows may be computed at once.

    Returns:
        `[count, *shape]` by argument; none where no gradient flows.
    """
    live: set[int] = set()  # arguments that some row's gradient flows to
    chunks: list[dict[int, Tensor]] = []
    for start in range(0, count, most):
        group = [cotangents(i) for i in range(start, min(start + most, count))]
        chunks.append(_node_group(node, arguments, group, live))
    found = {i: [chunk[i] for chunk in chunks] for i in arguments if i in live}
    return {i: torch.cat(rows) if len(rows) > 1 else rows[0] for i, rows in found.items()}


def _node_group(
    node: Node, arguments: Sequence[int], group: list[list[Tensor | None]], live: set[int]
) -> dict[int, Tensor]:
    present = [i for i, value in enumerate(group[0]) if value is not None]
    rows = [[value for value in row if value is not None] for row in group]

    def gradients(*values: Tensor) -> dict[int, Tensor]:
        places = dict(zip(present, values, strict=True))
        answers = apply_node(node, [places.get(i) for i in range(len(group[0]))])
        live.update(i for i in arguments if answers[i] is not None)
        return {i: as_source(node, i, answers[i]) for i in arguments}

    if len(group) > 1:
        found = _checked(
            lambda batches: [*torch.func.vmap(gradients)(*batches).values()],
            lambda sums: [*gradients(*sums).values()],
            [torch.stack(column) for column in zip(*rows, strict=True)],
        )
        if found is not None:
            pairs = zip(arguments, found, strict=True)
            return {i: batch for i, batch in pairs if batch is not None}
    each = [gradients(*row) for row in rows]
    return {i: torch.stack([one[i] for one in each]) for i in arguments}


def as_source(node: Node, argument: int, gradient: Tensor | None) -> Tensor:
    """A gradient in the shape and the dtype of what it is of, as between two operators."""
    source, number = node.next_functions[argument]
    assert source is not None
    shape, dtype = shape_of(source)[number], dtype_of(source)[number]
    if gradient is None:
        return torch.zeros(shape, dtype=dtype, device=device_of(source))
    return dense(gradient).sum_to_size(shape).to(dtype)


def rows_of_graph(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Callable[[int, int], list[Tensor]],
    sources: Sequence[Tensor | GradientEdge],
    count: int,
    most: int,
    *,
    is_sure: bool = False,
) -> list[Tensor | None]:
    """Rows of the Jacobian by backwards through the graph, batched where torch can.

    Args:
        outputs: What is differentiated.
        cotangents: From the numbers of the first row and the one after the last to the cotangents
            of these rows, `[rows, *shape]` for each output.
        sources: With respect to what: leaves, or tensors of the graph.
        count: The number of rows.
        most: How many rows may be computed at once.
        is_sure: Whether torch's rules for batches need no check.

    Returns:
        `[count, *shape]` for each source, None where nothing flows.
    """
    found: list[Tensor | None] = [None] * len(sources)
    leaves = [source for source in sources if isinstance(source, Tensor)]
    ends, starts = list(outputs), list(sources)
    with leaf_hooks_off(leaves), _thawed(leaves), ordinary_mode():
        for start in range(0, count, most):
            stop = min(start + most, count)
            batches = cotangents(start, stop)
            several = stop - start > 1
            rows = _batched(ends, batches, starts, is_sure=is_sure) if several else None
            if rows is not None:
                _put(rows, found, slice(start, stop), count)
                continue
            for i in range(start, stop):
                row = [batch[i - start] for batch in batches]
                _put(_grad(ends, row, starts, batched=False), found, i, count)
    return found


def _put(
    rows: Sequence[Tensor | None], found: list[Tensor | None], place: int | slice, count: int
) -> None:
    """Puts some rows where all of a source will be.

    A function of Python may return nothing for one cotangent and a gradient for the next.

    Args:
        rows: A row `[*shape]` of each source, or rows `[k, *shape]`; None for zeros.
        found: `[count, *shape]` for each source, None if all of its rows were zeros so far.
        place: The number of the row, or those of the rows.
        count: How many there will be.
    """
    start, is_one = (place, True) if isinstance(place, int) else (place.start, False)
    places: list[Tensor] = []
    values: list[Tensor] = []
    for i, own in enumerate(rows):
        total = found[i]
        if total is None and own is not None:
            own = dense(own)
            if not is_one and own.shape[0] == count:
                found[i] = own
                continue
            total = found[i] = own.new_empty(count, *(own.shape if is_one else own.shape[1:]))
            total[:start].zero_()
        if total is None:
            continue
        if own is None:
            total[place].zero_()
        else:
            places.append(total[place])
            values.append(dense(own))
    if places:
        copy_each(places, values)


def rows_together(
    output: Tensor, cotangents: Tensor, leaves: Sequence[Tensor], *, is_sure: bool
) -> list[Tensor | None] | None:
    """Rows of the Jacobian by one backward for all of them.

    Args:
        output: What is differentiated.
        cotangents: Of the rows, `[rows, *shape]`.
        leaves: With respect to what.
        is_sure: Whether torch's rules for batches need no check.

    Returns:
        `[rows, *shape]` for each leaf, None where nothing flows; nothing at all if some operator
        takes no batch, or torch's rule for it is wrong.
    """
    with leaf_hooks_off(leaves), _thawed(leaves), ordinary_mode():
        return _batched([output], [cotangents], list(leaves), is_sure=is_sure)


def rows_of_each(
    outputs: Sequence[GradientEdge | None],
    sources: Sequence[Tensor | GradientEdge],
    summed: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradient of one number after another, each by a backward through its own graph.

    Args:
        outputs: The numbers; None for one without a graph.
        sources: With respect to what: leaves, or tensors of the graph.
        summed: Leaves of which the sum of all gradients is wanted.

    Returns:
        `[count, *shape]` for each source, and the sums; None where nothing flows.
    """
    leaves = [source for source in (*sources, *summed) if isinstance(source, Tensor)]
    rows: list[Tensor | None] = [None] * len(sources)
    sums: list[Tensor | None] = [None] * len(summed)
    with leaf_hooks_off(leaves), _thawed(leaves), ordinary_mode():
        for i, edge in enumerate(outputs):
            found: tuple[Tensor | None, ...] = (None,) * (len(sources) + len(summed))
            if edge is not None:
                found = _grad([edge], [_one(edge)], [*sources, *summed], batched=False)
            _put(found[: len(sources)], rows, i, len(outputs))
            for k, gradient in enumerate(found[len(sources) :]):
                total = sums[k]
                if gradient is not None:
                    sums[k] = dense(gradient) if total is None else total + dense(gradient)
    return rows, sums


def _one(edge: GradientEdge) -> Tensor:
    shape, dtype = shape_of(edge.node)[edge.output_nr], dtype_of(edge.node)[edge.output_nr]
    return torch.ones(shape, dtype=dtype, device=device_of(edge.node))


@final
class _thawed(Change):  # noqa: N801
    """Lets leaves that were frozen since the forward be differentiated by."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._frozen = [source for source in sources if not source.requires_grad]

    def make(self) -> None:
        for source in self._frozen:
            source.requires_grad_(True)

    def undo(self) -> None:
        for source in self._frozen:
            source.requires_grad_(False)


def _batched(
    outputs: list[Tensor | GradientEdge],
    batches: list[Tensor],
    sources: Sequence[Tensor | GradientEdge],
    *,
    is_sure: bool,
) -> list[Tensor | None] | None:
    """Rows by one backward; None as for `_checked`."""
    return _checked(
        lambda cotangents: _grad(outputs, cotangents, sources, batched=True),
        lambda cotangents: _grad(outputs, cotangents, sources, batched=False),
        batches,
        is_sure=is_sure,
    )


def _checked(
    together: Callable[[list[Tensor]], Sequence[Tensor | None]],
    alone: Callable[[list[Tensor]], Sequence[Tensor | None]],
    batches: list[Tensor],
    *,
    is_sure: bool = False,
) -> list[Tensor | None] | None:
    """What a backward makes of a batch of cotangents, compared with what it makes of their sum.

    Args:
        together: Takes the batch, by torch's rules for batches.
        alone: Takes cotangents without a batch.
        batches: The cotangents `[rows, ...]` of each output.
        is_sure: Whether to spare the comparison.

    Returns:
        The rows of each source; None if they are wrong, or if an operator takes no batch: every
        operator takes cotangents one by one.
    """
    try:
        with _quiet():
            found = [*together(batches)]
        flowing = [rows for rows in found if rows is not None]
        if is_sure or not flowing:
            return found
        weights = _even_weights(flowing)
        sums = [_weighted(weights, batch) for batch in batches]
        return found if _adds_up(weights, found, alone(sums)) else None
    except RuntimeError:
        return None


def _grad(
    outputs: list[Tensor | GradientEdge],
    cotangents: list[Tensor],
    sources: Sequence[Tensor | GradientEdge],
    *,
    batched: bool,
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs,  # type: ignore[arg-type]
        sources,  # type: ignore[arg-type]
        cotangents,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )


def dense(tensor: Tensor) -> Tensor:
    """A gradient as an ordinary tensor: embeddings make sparse ones, `conj` makes lazy ones."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg() if tensor.is_complex() else tensor


def _even_weights(found: Sequence[Tensor]) -> Tensor:
    """Random weights under which every row counts alike, whatever its size: `[k]`, on the CPU.

    The random numbers are the same each time, and no global one is drawn.

    Args:
        found: Rows `[k, ...]` of several sources.
    """
    flat = [rows.detach().reshape(len(rows), rows[0].numel()) for rows in found]
    norms = [torch.linalg.vector_norm(r, dim=1, dtype=_wide_of(r)).cpu().double() for r in flat]
    sizes = torch.stack(norms).norm(dim=0)  # [k]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.rand(len(sizes), dtype=torch.float64, device="cpu", generator=generator) + 0.5
    return drawn / torch.where(sizes > 0, sizes, 1)


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """The sum of rows `[k, ...]` times their weights."""
    total: Tensor = torch.tensordot(weights.to(rows.device, rows.dtype), rows, 1)
    return total


def _adds_up(
    weights: Tensor, found: Sequence[Tensor | None], together: Sequence[Tensor | None]
) -> bool:
    """Whether rows found by vmap, whose rules are not all right, are those that were asked for.

    A backward is linear, so the weighted sum of cotangents gives the weighted sum of rows. One row
    computed alone would tell less: those of masked or equal poses agree by accident.

    Args:
        weights: `[k]`.
        found: The rows `[k, ...]` by source.
        together: What the weighted sum of cotangents gave.
    """
    if [rows is None for rows in found] != [one is None for one in together]:
        return False
    sums = [_weighted(weights, rows) for rows in found if rows is not None]
    pairs = list(zip(sums, [dense(one) for one in together if one is not None], strict=True))
    whole = math.hypot(*(_norm(total) for total in sums))
    for total, one in pairs:
        eps = torch.finfo(total.dtype).eps
        # Written so that nan does not add up. Below some rounding errors of all, nothing is wrong.
        if not _norm(total - one) <= eps**0.5 * _norm(total) + 64 * eps * whole:
            return False
    return True


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=_wide_of(tensor)))


def _wide_of(tensor: Tensor) -> torch.dtype:
    """A dtype in which squares of its numbers neither overflow nor vanish."""
    return torch.complex128 if tensor.is_complex() else torch.float64


@final
class _quiet(Change):  # noqa: N801
    """Silences vmap's remarks on operators that it takes one by one."""

    def __init__(self) -> None:
        self._caught = warnings.catch_warnings()

    def make(self) -> None:
        self._caught.__enter__()
        for message in _VMAP_LEFT:
            warnings.filterwarnings("ignore", message, UserWarning)

    def undo(self) -> None:
        with suppress(RuntimeError, AttributeError):  # if it was not entered, or in part
            self._caught.__exit__(None, None, None)
