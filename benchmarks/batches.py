"""Gradients of single poses in one batch: their Gramian, or all of them.

Task `gramian`: forward, the Gramian of the per-pose gradients, and their sum under given weights.
Task `rows`: forward, and all per-pose gradients as tensors; `matrix`: in one matrix. All as a ratio
to plain forward and backward of the summed output, within a round.

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

from benchmarks import gramian_memory
from benchmarks.cases import CASES
from benchmarks.environment import environment
from benchmarks.per_example import PLAIN, TASKS, Bind, missing, plain
from benchmarks.rounds import CLOCKS, Clock, prepare
from benchmarks.side_by_side import Key, Row, side_by_side

__all__ = ["run"]


def run(
    cases: Sequence[str],
    *,
    rounds: int = 3,
    threads: int = 1,
    clock: str = "wall",
    memory: bool = True,
) -> dict[str, Any]:
    """Run the suite.

    Args:
        cases: Names out of `CASES`.
        rounds: How often each method is timed.
        threads: Threads of torch.
        clock: One of `CLOCKS`.
        memory: Whether to measure peak memory, which starts a process for each case and method.

    Returns:
        What goes into the JSON file: environment, cases, and one row for each case, task and
        method, with its raw seconds, or with the reason why it was not run.
    """
    prepare(threads)
    absent = missing()
    ways = {name: _ways(name, absent) for name in cases}
    rows: list[Row] = []
    with tqdm(total=sum(map(len, ways.values())) * (rounds + memory)) as bar:
        for name in cases:
            bar.set_description(name)
            rows += _timed(name, ways[name], rounds, CLOCKS[clock], bar)
        for row in rows if memory else []:
            if "unfit" not in row:
                bar.set_description(f"memory, {row['case']}, {row['task']}, {row['method']}")
                row |= gramian_memory.measure(
                    row["case"], row["task"], row["method"], threads=threads
                )
                bar.update()
    return {
        "suite": "gramian",
        "rounds": rounds,
        "clock": clock,
        "environment": environment(),
        "missing": absent,
        "cases": [{"case": n, "text": CASES[n].text, "poses": CASES[n].m} for n in cases],
        "rows": rows,
    }


def _ways(case: str, absent: dict[str, str]) -> dict[Key, Bind]:
    """Plain autograd, and every installed method that fits the case."""
    found: dict[Key, Bind] = {(PLAIN, PLAIN): plain}
    for task, methods in TASKS.items():
        for name, method in methods.items():
            if CASES[case].kind not in method.unfit and method.package not in absent:
                found[task, name] = method.bind
    return found


def _timed(
    case: str, ways: dict[Key, Bind], rounds: int, now: Clock, bar: "tqdm[Any]"
) -> list[Row]:
    problem = CASES[case].make(CASES[case].m)
    found = side_by_side(problem, ways, rounds=rounds, now=now, tick=bar.update)
    rows: list[Row] = [{"case": case, "task": PLAIN, "method": PLAIN, **found[PLAIN, PLAIN]}]
    for task, methods in TASKS.items():
        for name, method in methods.items():
            row = {"case": case, "task": task, "method": name}
            if (task, name) in found:
                rows.append(row | found[task, name])
            elif CASES[case].kind in method.unfit:
                rows.append(row | {"unfit": method.unfit[CASES[case].kind]})
    return rows
