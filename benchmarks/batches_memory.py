"""Peak memory of one method of the suites on one batch, in a process of its own.

`python -m benchmarks.batches_memory '{"case": …, "task": …, "method": …, "threads": …,
"device": …}'` prints one JSON object. The first call of a method counts what it does once
(posegrad: the engine, finding the owners, the check; TorchJD and Opacus: hooks); it is also what
sets a process's size.
"""

import copy
from functools import partial

from torch import nn

from benchmarks.cases import CASES, Problem
from benchmarks.per_pose import PLAIN, Bind, Step, plain
from benchmarks.process import Peaks, live_mib, resident_mib, serve
from benchmarks.settings import Settings
from benchmarks.tasks import TASKS


def _case(case: str, task: str, method: str, threads: int, device: str) -> Peaks:
    """Peak MiB of a method on a case.

    Returns:
        `first_live_mib`, `second_live_mib`: bytes of the tensors alive at once beyond those alive
        before, in the first call, with binding to the network, and in the second; exact.
        `resident_mib`: how far a first call raises the process's high-water mark; None where the
        system has no `/proc`.
    """
    Settings(threads=threads).prepare()
    bind = plain if task == PLAIN else TASKS[task].ways[method].bind

    # First use loads kernels and code: two poses, to stay below any call's own peak.
    small = CASES[case].make(2).to(device)
    bind(small.network)(small)
    del small

    problem = CASES[case].make(CASES[case].m).to(device)
    first, second = copy.deepcopy(problem.network), copy.deepcopy(problem.network)
    resident = resident_mib(partial(_first_call, bind, first, problem), device)
    steps: list[Step] = []  # the same again: watching each operation costs memory itself
    first_live = live_mib(lambda: steps.append(_first_call(bind, second, problem)), device)
    second.zero_grad()  # so that gradients are counted in both
    return {
        "resident_mib": resident,
        "first_live_mib": first_live,
        "second_live_mib": live_mib(lambda: steps[0](problem), device),
    }


def _first_call(bind: Bind, network: nn.Module, problem: Problem) -> Step:
    step = bind(network)
    step(problem)
    return step


if __name__ == "__main__":
    serve(_case)
