"""Ordinary code: losses and networks as people write them, beside the naive ways and the peers.

`ordinary` has a network of each kind, and all peers; `published` has published models at three
sizes, beside the naive ways alone.

All as a ratio to a plain step, forward and backward of the summed losses, within a round. A peer
that raises on a network has no figure but its error's first line. The allocator matters as in
`batches.py`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.ordinary import published, ways
from benchmarks.ordinary.cases import CASES, Case
from benchmarks.ordinary.exact import Exact, seeded
from benchmarks.ordinary.problem import Problem
from benchmarks.ordinary.reading import read
from benchmarks.ordinary.tasks import NAIVE, REQUIREMENTS, TASKS, Task
from benchmarks.ordinary.ways import Bind, Found, Step
from benchmarks.per_pose import PLAIN
from benchmarks.rounds import interleaved
from benchmarks.settings import Row, Settings
from benchmarks.side_by_side import Key
from benchmarks.tasks import missing

__all__ = ["SUITES", "run"]

SUITES: dict[str, Mapping[str, Case]] = {"ordinary": CASES, "published": published.CASES}
"""The cases of each."""

LEAST = 3.0  # seconds for a case
SAME_RANDOM = ("posegrad", "loop of autograd.grad")  # the others draw other numbers


def run(suite: str, cases: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run one of the suites.

    Args:
        suite: A name out of `SUITES`.
        cases: Names out of its cases.
        settings: How.

    Returns:
        What goes into the JSON file: cases, how posegrad reads each, and one row for each case,
        task and way, or the reason why it was not run.
    """
    settings.prepare()
    absent = missing(REQUIREMENTS) if suite == "ordinary" else {}
    tasks = TASKS if suite == "ordinary" else NAIVE
    rows: list[Row] = []
    told: list[Row] = []
    for case in tqdm(cases):
        made = SUITES[suite][case]
        problem = made.make()
        told.append({"case": case, "text": made.text, "poses": problem.m, **read(problem)})
        rows += [{"case": case, **row} for row in _measured(problem, tasks, absent, settings)]
    titles = {name: task.text for name, task in tasks.items()}
    return settings.result(suite, rows, missing=absent, cases=told, tasks=titles)


def _measured(
    problem: Problem, tasks: Mapping[str, Task], absent: dict[str, str], settings: Settings
) -> list[Row]:
    """Errors and seconds of every way to every task, or why there are none."""
    exact = Exact.of(problem)
    calls: dict[Key, Step] = {(PLAIN, PLAIN): ways.plain(problem.copied())}
    rows: dict[Key, Row] = {(PLAIN, PLAIN): {}}
    for task, what in tasks.items():
        for name, method in what.ways.items():
            key, unfit = (task, name), method.unfit(problem)
            if method.package in absent:
                continue
            if unfit is not None:
                rows[key] = {"unfit": unfit}
                continue
            step = _first_calls(method.bind, problem)
            if isinstance(step, str):
                rows[key] = {"unfit": step}
                continue
            calls[key], found = step
            known = not problem.is_random or name in SAME_RANDOM
            rows[key] = exact.errors(task, found) if known else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed = interleaved(calls, settings.rounds, settings.stopwatch, least=LEAST)
    for key, seconds in timed.items():
        rows[key]["seconds"] = seconds
    return [{"task": task, "method": name, **row} for (task, name), row in rows.items()]


def _first_calls(bind: Bind, problem: Problem) -> tuple[Step, Found] | str:
    """The step and what it finds, or what it raises on the first or second call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step = bind(problem.copied())
            step()
            seeded()
            return step, step()
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {first[0][:100]}"
