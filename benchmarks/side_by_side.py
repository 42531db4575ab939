"""Ways of differentiating one problem: each one's errors and seconds."""

import copy
from collections.abc import Mapping
from functools import partial

from benchmarks.cases import Problem
from benchmarks.exact import Exact
from benchmarks.per_pose import PLAIN, Bind
from benchmarks.rounds import interleaved
from benchmarks.settings import Row, Settings
from benchmarks.tasks import TASKS

__all__ = ["Key", "side_by_side"]

Key = tuple[str, str]  # task, method

LEAST = 60.0  # seconds for a case


def side_by_side(problem: Problem, ways: Mapping[Key, Bind], settings: Settings) -> dict[Key, Row]:
    """What each way finds, compared with float64, and how long it takes.

    Each is called twice before it is timed, and has a copy of the network: nothing that one of them
    hangs on its modules slows another.

    Returns:
        `seconds` of each round, and the errors of its task, all relative.
    """
    calls = {
        key: partial(bind(copy.deepcopy(problem.network)), problem) for key, bind in ways.items()
    }
    exact = Exact.of(problem)
    rows: dict[Key, Row] = {}
    for key, call in calls.items():
        found = call()
        # The unit has no weights, and nothing to be compared with.
        rows[key] = {} if key[0] == PLAIN else TASKS[key[0]].errors(found, exact)
        del found
    del exact
    timed = interleaved(calls, settings.rounds, settings.stopwatch, least=LEAST)
    for key, seconds in timed.items():
        rows[key]["seconds"] = seconds
    return rows
