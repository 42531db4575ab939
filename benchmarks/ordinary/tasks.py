"""What is asked of the losses of a batch, and the ways to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.ordinary import peers, ways
from benchmarks.ordinary.problem import Problem
from benchmarks.ordinary.ways import Bind
from benchmarks.tasks import REQUIREMENTS as OF_BATCHES

__all__ = ["NAIVE", "REQUIREMENTS", "TASKS", "Method", "Task"]

NOT_SLICED = "a loss is not that of one item"
MANY = "not run: its solver takes seconds"


@dataclass(frozen=True)
class Method:
    """A way of doing a task.

    Attributes:
        bind: Makes its step for a problem, which nothing else may use.
        package: What it needs beside torch and posegrad.
        unfit: Why it is not run on a problem, if it is not.
    """

    bind: Bind
    package: str | None = None
    unfit: Callable[[Problem], str | None] = lambda problem: None


@dataclass(frozen=True)
class Task:
    """Something to find.

    Attributes:
        text: What, in words.
        ways: How.
    """

    text: str
    ways: Mapping[str, Method]


def _of_items(problem: Problem) -> str | None:
    return None if problem.is_sliced else NOT_SLICED


def _few(problem: Problem) -> str | None:
    return None if problem.m <= 64 else MANY


def _vmap(end: str) -> Method:
    return Method(partial(ways.of_rows, ways.vmap_rows, end), None, _of_items)


def _listening(what: str) -> dict[str, Method]:
    return {
        "posegrad": Method(partial(ways.heard, what)),
        "posegrad, two backwards": Method(partial(ways.read_first, what)),
        "dattri-llm": Method(partial(peers.dattri_heard, what), "dattri_llm", _of_items),
    }


TASKS: dict[str, Task] = {
    "norms": Task(
        "Forward, the norm of each pose's gradient",
        {"posegrad": Method(ways.norms), "vmap(grad)": _vmap("norms")},
    ),
    "clip": Task(
        "Forward, the sum of the poses' gradients, each clipped to norm 1",
        {
            "posegrad": Method(ways.clipped),
            "loop of autograd.grad": Method(ways.loop_clipped),
            "vmap(grad)": _vmap("clip"),
            "Opacus, flat": Method(peers.opacus_flat, "opacus", _of_items),
            "Opacus, ghost": Method(peers.opacus_ghost, "opacus", _of_items),
        },
    ),
    "gramian": Task(
        "Forward, Gramian of the poses' gradients, weighted gradient",
        {
            "posegrad": Method(ways.products),
            "loop of autograd.grad": Method(partial(ways.of_rows, ways.loop_rows, "gramian")),
            "vmap(grad)": _vmap("gramian"),
            "TorchJD": Method(peers.torchjd, "torchjd"),
            "dattri-llm": Method(peers.dattri, "dattri_llm", _of_items),
        },
    ),
    "listen-norms": Task("A plain step, and the norm of each pose's gradient", _listening("norms")),
    "listen-gramian": Task(
        "A plain step, and the Gramian of the poses' gradients", _listening("gramian")
    ),
    "upgrad": Task(
        "Forward, gradient by UPGrad",
        {
            "posegrad": Method(ways.projected, "torchjd", _few),
            "TorchJD": Method(peers.torchjd_projected, "torchjd", _few),
        },
    ),
}

NAIVE: dict[str, Task] = {
    name: Task(task.text, {n: way for n, way in task.ways.items() if way.package is None})
    for name, task in TASKS.items()
    if name in ("norms", "clip", "gramian")
}
"""The tasks with posegrad's ways and those that need no package."""

REQUIREMENTS = {
    "torchjd": OF_BATCHES["torchjd"],
    "opacus": OF_BATCHES["opacus"],
    "dattri_llm": "dattri-llm>=0.1",
}
