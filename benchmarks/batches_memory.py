"""Peak memory of one method of the suite `gramian`, in a process of its own.

`python -m benchmarks.gramian_memory '{"case": …, "task": …, "method": …, "threads": …}'` prints one
JSON object. The first call of a method counts what it does once (posegrad: the engine, finding the
owners, the check; TorchJD and Opacus: hooks); it is also what sets a process's size.
"""

import copy
from functools import partial

from torch import nn

from benchmarks.cases import CASES, Problem
from benchmarks.per_example import PLAIN, TASKS, Bind, Step, plain
from benchmarks.process import Peaks, fresh, live_mib, resident_mib, serve
from benchmarks.rounds import prepare

__all__ = ["measure"]


def measure(case: str, task: str, method: str, *, threads: int) -> Peaks:
    """Peak MiB of a method on a case, in a fresh process.

    Returns:
        `first_live_mib`, `second_live_mib`: bytes of the tensors alive at once beyond those alive
        before, in the first call, with binding to the network, and in the second; exact.
        `resident_mib`: how far a first call raises the process's high-water mark; None where the
        system has no `/proc`.
    """
    description = {"case": case, "task": task, "method": method, "threads": threads}
    return fresh("benchmarks.gramian_memory", description)


def _case(case: str, task: str, method: str, threads: int) -> Peaks:
    prepare(threads)
    bind = plain if task == PLAIN else TASKS[task][method].bind

    # First use loads kernels and code: two poses, to stay below any call's own peak.
    small = CASES[case].make(2)
    bind(small.network)(small.inputs, small.weights)
    del small

    problem = CASES[case].make(CASES[case].m)
    first, second = copy.deepcopy(problem.network), copy.deepcopy(problem.network)
    resident = resident_mib(partial(_first_call, bind, first, problem))
    steps: list[Step] = []  # the same again: watching each operation costs memory itself
    return {
        "resident_mib": resident,
        "first_live_mib": live_mib(lambda: steps.append(_first_call(bind, second, problem))),
        "second_live_mib": live_mib(lambda: steps[0](problem.inputs, problem.weights)),
    }


def _first_call(bind: Bind, network: nn.Module, problem: Problem) -> Step:
    step = bind(network)
    step(problem.inputs, problem.weights)
    return step


if __name__ == "__main__":
    serve(_case)
