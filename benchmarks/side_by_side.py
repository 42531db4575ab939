"""Ways of differentiating one problem: each one's errors and seconds."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.cases import Problem
from benchmarks.exact import Exact, largest_difference
from benchmarks.opacus_hooks import packed
from benchmarks.per_example import Bind, Found
from benchmarks.rounds import Clock, interleaved

__all__ = ["Key", "Row", "side_by_side"]

Key = tuple[str, str]  # task, method
Row = dict[str, Any]


def side_by_side(
    problem: Problem,
    ways: Mapping[Key, Bind],
    *,
    rounds: int,
    now: Clock,
    tick: Callable[[], object] = lambda: None,
) -> dict[Key, Row]:
    """What each way finds, compared with float64, and how long it takes.

    Each is called twice before it is timed, and has a copy of the network: nothing that one of them
    hangs on its modules slows another.

    Returns:
        `seconds` of each round, and what applies of `gramian_error`, `gradient_error`,
        `rows_error`, all relative.
    """
    calls = {
        key: partial(bind(copy.deepcopy(problem.network)), problem.inputs, problem.weights)
        for key, bind in ways.items()
    }
    exact = Exact.of(problem)
    rows = {key: _errors(key[0], call(), exact) for key, call in calls.items()}
    del exact
    for key, seconds in interleaved(calls, rounds, now, tick).items():
        rows[key]["seconds"] = seconds
    return rows


def _errors(task: str, found: Found, exact: Exact) -> Row:
    gramian, named = found
    if task in ("rows", "matrix"):
        flat = {name: rows.flatten(1) for name, rows in packed(named, 1).items()}
        return {"rows_error": largest_difference(flat, exact.rows)}
    if gramian is None:  # plain, whose sum has no weights
        return {}
    return {
        "gramian_error": float((gramian - exact.gramian).norm() / exact.gramian.norm()),
        "gradient_error": largest_difference(packed(named, 0), exact.gradient),
    }
