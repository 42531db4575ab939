"""Gradients of single poses in one batch: their Gramian, all of them, or their clipped sum.

All as a ratio to plain forward and backward of the summed output, within a round.

Time: all methods in one process (`rounds.py`). On a CPU it should be run as `make bench` does, with
`GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296:
glibc.malloc.top_pad=268435456` (one word): rows of an MLP are large blocks, which glibc gives back
to the system when they are freed, and to fault them in again takes longer than to fill them. glibc
reads this when a process starts, so it is set outside; the JSON states what was. Memory: a fresh
process for each case and method, with glibc's own settings. Errors: against rows by plain autograd
in float64, in the same run. `mlp-256` takes 12 GB.
"""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.cases import CASES, described
from benchmarks.per_pose import PLAIN, Bind
from benchmarks.settings import Memory, Row, Settings
from benchmarks.side_by_side import Key, side_by_side
from benchmarks.tasks import TASKS, missing

__all__ = ["MEMORY", "SUITES", "run"]

MEMORY = Memory("benchmarks.batches_memory", ("case", "task", "method"))

SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "gramian": {"gramian": tuple(CASES)},
    "rows": dict.fromkeys(
        ("rows", "matrix"), ("mlp-64", "conv-32", "encoder-16", "large-8", "schnet-16")
    ),
    "clipping": {"clipping": ("mlp-64", "conv-32", "encoder-16", "large-8")},
}
"""Which tasks a suite has, and on which cases."""


def run(suite: str, cases: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run one of the suites.

    Args:
        suite: A name out of `SUITES`.
        cases: Names out of `CASES`.
        settings: How.

    Returns:
        What goes into the JSON file: cases, and one row for each case, task and method, or the
        reason why it was not run.
    """
    settings.prepare()
    absent = missing()
    rows: list[Row] = []
    for case in tqdm(cases):
        tasks = [task for task, own in SUITES[suite].items() if case in own]
        rows += [{"case": case, **row} for row in _of(case, tasks, absent, settings)]
    titles = {task: TASKS[task].text for task in SUITES[suite]}
    return settings.result(suite, rows, missing=absent, cases=described(cases), tasks=titles)


def _of(case: str, tasks: Sequence[str], absent: dict[str, str], settings: Settings) -> list[Row]:
    problem, kind = CASES[case].make(CASES[case].m).to(settings.device), CASES[case].kind
    (unit,) = {TASKS[task].unit for task in tasks}
    ways: dict[Key, Bind] = {(PLAIN, PLAIN): unit}
    unfit: list[Row] = []
    for task in tasks:
        for name, method in TASKS[task].ways.items():
            if kind in method.unfit:
                unfit.append({"task": task, "method": name, "unfit": method.unfit[kind]})
            elif method.package not in absent:
                ways[task, name] = method.bind
    found = side_by_side(problem, ways, settings)
    return [{"task": task, "method": name, **row} for (task, name), row in found.items()] + unfit
