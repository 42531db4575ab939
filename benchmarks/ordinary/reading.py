"""How posegrad read a problem: backwards, paths, warnings."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.autograd import Variable

from benchmarks.ordinary.problem import Problem
from benchmarks.settings import Row
from posegrad import Engine

__all__ = ["read"]

CLOSED = ("closed form", "unused")


def read(problem: Problem) -> Row:
    """What the third call on one structure takes, and what the first three say.

    Returns:
        `backwards` of the third call beside those of its forward, `open` parameters by the path
        that is no closed form, and `warnings`.
    """
    network = copy.deepcopy(problem.network)
    engine = Engine(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            losses = problem.of(network)
            with _counted() as count:
                J = engine.jacobian(losses)
                J.norms()
    said = [str(w.message).splitlines()[0] for w in caught]
    return {
        "backwards": len(count),
        "open": _open(J.paths),
        "warnings": list(dict.fromkeys(said)),
        "report": J.report(),
    }


def _open(paths: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in paths.values():
        for part in path:
            if not part.startswith(CLOSED):
                found[part] = found.get(part, 0) + 1
    return found


class _Counting:
    """Autograd's engine, which says how often it was called."""

    def __init__(self, engine: Any, count: list[None]) -> None:
        self.engine, self.count = engine, count

    def run_backward(self, *args: Any, **more: Any) -> Any:
        self.count.append(None)
        return self.engine.run_backward(*args, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@contextmanager
def _counted() -> Iterator[list[None]]:
    """One entry for each backward."""
    count: list[None] = []
    with patch.object(Variable, "_execution_engine", _Counting(Variable._execution_engine, count)):
        yield count
