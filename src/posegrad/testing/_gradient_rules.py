"""The laws of rules that look at gradients, as functions their author calls."""

import copy
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from posegrad.testing._seeded import seeded
from posegrad.weighting import Aggregation, Weighting
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["assert_aggregation", "assert_weighting"]

_COUNTS = (1, 2, 3, 5, 8)
_COLUMNS = 12


@torch.no_grad()
def assert_weighting(
    rule: AnyRule,
    rows: Tensor | None = None,
    predictions: Tensor | None = None,
    *,
    least: int = 1,
    any_order: bool = True,
    tolerance: float = 1e-9,
) -> None:
    r"""Asserts the laws of a `Weighting`.

    There is one finite weight for each row. The Gramian and the predictions are left as they are.
    Equal calls give equal weights; copies and pickles behave alike. Renumbering the poses does not
    change the gradient :math:`w^\top J`. A float32 Gramian beside predictions in half precision
    works.

    Args:
        rule: The rule; or a weighting of TorchJD's that reads the Gramian.
        rows: J `[M, n]` to check the laws on. Default: draws of 1 to 8 rows, among them more rows
            than columns, rows that are alike, opposed, or zero, and lengths from 1e-6 to 1e6.
        predictions: `[M]`, with `rows`; default: drawn.
        least: The fewest rows the rule takes.
        any_order: False for a rule that treats poses by their number, as TorchJD's `PCD`.
        tolerance: Largest difference of gradients, as a share of the largest row times its weight.

    Raises:
        AssertionError: naming the law that does not hold, with the numbers.
        TypeError: if `rule` is no weighting of Gramians.

    Example:
        >>> assert_weighting(Clip(max_norm=0.5))
    """
    found = as_gradient_rule(rule)
    if not isinstance(found, Weighting):
        raise TypeError(f"{type(rule).__name__} is not a Weighting that reads the Gramian.")
    draws = _rows(least) if rows is None else iter([rows.detach().double()])
    wide, narrow = copy.deepcopy(found).double(), copy.deepcopy(found).float()
    for draw in draws:
        scores = _predictions(len(draw)) if predictions is None else predictions.detach().double()
        _gives_one_finite_weight_for_each_row(wide, draw, scores)
        _leaves_its_arguments_alone(wide, draw, scores)
        _repeats_and_copies_agree(wide, lambda r, j=draw, y=scores: r(j @ j.mT, y))  # type: ignore[misc]
        if any_order:
            _order_does_not_change_the_gradient(wide, draw, scores, tolerance)
        _gives_finite_weights_in_less_precision(narrow, draw, scores)


@torch.no_grad()
def assert_aggregation(
    rule: Aggregation, block: Tensor | None = None, *, least: int = 1, tolerance: float = 1e-9
) -> None:
    """Asserts the laws of an `Aggregation`.

    The result has the shape of one row. Equal calls give equal results; copies and pickles behave
    alike. The order of the poses does not matter. Rows that are all alike are their own aggregate.
    What a column gives depends on that column alone. A column with a nan gives nan. Half precision
    works.

    Args:
        rule: The rule.
        block: `[M, ...]` to check the laws on. Default: draws of 1 to 8 rows of no, one and two
            dimensions, among them rows that are alike, opposed, or zero, and numbers from 1e-6 to
            1e6.
        least: The fewest rows the rule takes.
        tolerance: Largest difference, as a share of the largest number of the column.

    Raises:
        AssertionError: naming the law that does not hold, with the numbers.

    Example:
        >>> assert_aggregation(Median())
        >>> assert_aggregation(TrimmedMean(1), least=3)
    """
    draws = _blocks(least) if block is None else iter([block.detach().double()])
    wide, narrow = copy.deepcopy(rule).double(), copy.deepcopy(rule).float()
    for draw in draws:
        _has_the_shape_of_one_row(wide, draw)
        _repeats_and_copies_agree(wide, lambda r, b=draw: r(b.clone()))  # type: ignore[misc]
        _order_does_not_matter(wide, draw, tolerance)
        _rows_alike_are_their_own_aggregate(wide, draw, tolerance)
        _columns_do_not_know_of_each_other(wide, draw, tolerance)
        _nan_is_seen(wide, draw)
        _gives_finite_numbers_in_less_precision(narrow, draw)


def _rows(least: int) -> Iterator[Tensor]:
    generator = seeded(20)
    for count in sorted({least, *(count for count in _COUNTS if count > least)}):
        draw = torch.randn(count, _COLUMNS, generator=generator, dtype=torch.float64)
        some = draw.clone()
        some[0] = 0
        opposed = draw.clone()
        opposed[1::2] = -draw[: count // 2]
        alike = draw[torch.arange(count) // 2]
        yield from (draw, 1e-6 * draw, 1e6 * draw)
        yield from (draw[:, :2], alike, opposed, some, torch.zeros_like(draw))


def _blocks(least: int) -> Iterator[Tensor]:
    for draw in _rows(least):
        yield from (draw, draw[:, 0], draw.reshape(len(draw), 2, -1))


def _predictions(count: int) -> Tensor:
    generator = seeded(count)
    return 4 * torch.randn(count, generator=generator, dtype=torch.float64) - 8


def _orders(count: int) -> list[Tensor]:
    generator = seeded(count)
    return [
        torch.arange(count).flip(0),
        torch.randperm(count, generator=generator),
    ]


def _gives_one_finite_weight_for_each_row(rule: nn.Module, rows: Tensor, scores: Tensor) -> None:
    weights = rule(rows @ rows.mT, scores)
    assert weights.shape == (len(rows),), (
        f"there is one weight for each row: {list(weights.shape)} for {len(rows)} rows"
    )
    assert bool(weights.isfinite().all()), f"weights are finite: {weights} for the rows {rows}"


def _leaves_its_arguments_alone(rule: nn.Module, rows: Tensor, scores: Tensor) -> None:
    gramian, own = rows @ rows.mT, scores.clone()
    rule(gramian, own)
    assert torch.equal(gramian, rows @ rows.mT), "the rule leaves the Gramian as it is"
    assert torch.equal(own, scores), "the rule leaves the predictions as they are"


def _repeats_and_copies_agree(rule: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    expected = call(rule).clone()
    assert torch.equal(call(rule), expected), "equal calls give equal numbers"
    assert torch.equal(call(copy.deepcopy(rule)), expected), "a copy of the rule behaves alike"
    try:
        revived = pickle.loads(pickle.dumps(rule))
    except (AttributeError, pickle.PicklingError):
        return  # a lambda, or a class defined inside a function: Python cannot pickle those
    assert torch.equal(call(revived), expected), "a pickled rule behaves alike"


def _order_does_not_change_the_gradient(
    rule: nn.Module, rows: Tensor, scores: Tensor, tolerance: float
) -> None:
    weights = rule(rows @ rows.mT, scores)
    for order in _orders(len(rows)):
        mixed = rows[order]
        others = rule(mixed @ mixed.mT, scores[order])
        sizes = torch.maximum(weights[order].abs(), others.abs()) * mixed.norm(dim=1)
        _close(
            others @ mixed,
            weights @ rows,
            "renumbering the poses does not change the gradient",
            tolerance * float(sizes.max()),
        )


def _gives_finite_weights_in_less_precision(rule: nn.Module, rows: Tensor, scores: Tensor) -> None:
    rows = rows.float()
    law = "a float32 Gramian beside predictions in half precision will do"
    weights = _attempt(law, lambda: rule(rows @ rows.mT, scores.bfloat16()))
    assert weights.shape == scores.shape, f"{law}: {list(weights.shape)}"
    assert bool(weights.isfinite().all()), f"{law}: {weights}"


def _has_the_shape_of_one_row(rule: Aggregation, block: Tensor) -> None:
    found = list(rule(block.clone()).shape)
    assert found == list(block.shape[1:]), (
        f"the result has the shape of one row: {found} of {list(block.shape)}"
    )


def _order_does_not_matter(rule: Aggregation, block: Tensor, tolerance: float) -> None:
    expected = rule(block.clone())
    for order in _orders(len(block)):
        law = "the order of the poses does not matter"
        _close(rule(block[order]), expected, law, tolerance * _size(block))


def _rows_alike_are_their_own_aggregate(rule: Aggregation, block: Tensor, tolerance: float) -> None:
    alike = block[:1].expand_as(block).clone()
    law = "rows that are all alike are their own aggregate"
    _close(rule(alike), block[0], law, tolerance * _size(block))


def _columns_do_not_know_of_each_other(rule: Aggregation, block: Tensor, tolerance: float) -> None:
    columns = block.reshape(len(block), -1)
    alone = [rule(piece.clone()) for piece in torch.split(columns, 1, dim=1)]
    expected = rule(block.clone()).reshape(-1)
    law = "what a column gives depends on that column alone"
    _close(torch.cat(alone), expected, law, tolerance * _size(block))


def _nan_is_seen(rule: Aggregation, block: Tensor) -> None:
    columns = block.reshape(len(block), -1).clone()
    columns[-1, 0] = torch.nan
    found = rule(columns)
    assert bool(found[0].isnan()), f"a column with a nan gives nan: {found[0]} of {columns[:, 0]}"


def _gives_finite_numbers_in_less_precision(rule: Aggregation, block: Tensor) -> None:
    law = "half precision will do"
    found = _attempt(law, lambda: rule(block.bfloat16()))
    assert bool(found.isfinite().all()), f"{law}: {found}"


def _attempt(law: str, call: Callable[[], Tensor]) -> Tensor:
    try:
        return call()
    except (RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"{law}: {error}") from error


def _size(block: Tensor) -> float:
    return float(block.abs().max())


def _close(found: Tensor, expected: Tensor, law: str, tolerance: float) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{law}: {text}"
    )
