r"""What each schedule costs, and the cheapest that fits: arithmetic on a few numbers.

With F = 1 for a forward of one pose and B for its backward, chunks of c poses, k poses that carry
weight and K running sums, m poses take

================  =========================================  ==================================
schedule          time                                       bytes, beside the parameters' own
================  =========================================  ==================================
`retain`          m (1 + B)                                  m graphs
`store`           m (1 + B), in chunks m (1 + 1.2 B)         m rows, one chunk's graph
`stream`          m (1 + K B), or m (1 + B) with c = 1       K gradients, one chunk's graph
`recompute`       m + k (1 + B)                              one gradient, one chunk's graph
================  =========================================  ==================================

The fixed time of a chunk that posegrad runs itself is added. No clock is read: choosing otherwise
in the next run would change the last bits of the result.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

from posegrad.jacobian._record import record

__all__ = ["BACKWARD", "Cost", "Load", "cheapest", "costs", "rows"]

BACKWARD = 2.0
"""The time of a backward, in forwards: two products for each one of the forward."""

_ROWS = 1.2  # the time of a backward that reads the rows of several poses, in plain backwards

_NEAR = 1.05  # times that differ by less are alike


@final
@dataclass
class Load:
    """What a call has to do.

    Args:
        poses: m.
        chunks: The number of chunks of c poses.
        whole: Whether all poses may be scored in one forward, whose graph fits.
        counting: k, how many poses carry weight.
        sums: K, the running sums of a rule that streams; 0 if it does not.
        graph: The bytes that one pose's graph keeps; None if it was not measured.
        gradient: The bytes of one gradient of all parameters.
        budget: The bytes that may be kept.
        components: How many numbers a prediction has.
        groups: How many groups there are.
        early: Whether poses may be differentiated before the loss is known.
        apart: Whether, as far as is known, the rows of single poses can be had: poses scored
            together must stay apart.
        picks: Whether poses are scored again by themselves, not with their whole chunk.
        walked: Whether each pose is a forward of its own, whatever its chunk.
        backward: The time of a backward, in forwards.
        extra: The fixed time of a chunk, in forwards of one pose.
    """

    poses: int = 1
    chunks: int = 1
    whole: bool = False
    counting: int = 1
    sums: int = 0
    graph: float | None = None
    gradient: int = 0
    budget: int = 2**30
    components: int = 1
    groups: int = 1
    early: bool = True
    apart: bool = True
    picks: bool = True
    walked: bool = False
    backward: float = BACKWARD
    extra: float = 0.0

    @property
    def together(self) -> int:
        """c: about how many poses the largest chunk has."""
        return -(-self.poses // self.chunks)

    @property
    def again(self) -> int:
        """How many poses `recompute` scores again, as far as can be told beforehand."""
        return self.counting if self.picks else min(self.poses, self.counting * self.together)


@final
@record
class Cost:
    """What one schedule takes.

    Args:
        schedule: Its name.
        time: In forwards of one pose.
        graphs: How many poses' graphs are alive at once.
        held: The bytes kept beside the graphs.
        bytes: The bytes of both; None if graphs were not measured.
        serves: Whether `auto` may choose it for such a call.
        fits: Whether the bytes are within the budget. Running sums count as the parameters' own,
            and one chunk's graph is needed in any case.
    """

    schedule: str
    time: float
    graphs: int
    held: float
    bytes: float | None
    serves: bool
    fits: bool


def costs(load: Load) -> list[Cost]:
    """The costs of all four schedules."""
    return [_retain(load), _store(load), _stream(load), _recompute(load)]


def cheapest(load: Load) -> Cost:
    """The fastest that serves and fits; among those within 5 % of it, the least in memory."""
    return _cheapest(tuple(vars(load).values()))


@lru_cache(maxsize=2**10)
def _cheapest(numbers: tuple[Any, ...]) -> Cost:
    """`cheapest`, cached: equal calls have equal loads."""
    able = [cost for cost in costs(Load(*numbers)) if cost.serves and cost.fits]
    least = min(cost.time for cost in able)
    near = [cost for cost in able if cost.time <= _NEAR * least]
    return min(near, key=lambda cost: (cost.bytes or 0.0, cost.time))


def _retain(load: Load) -> Cost:
    time = load.poses * (1 + load.backward)
    one_chunk = load.chunks == 1
    serves = one_chunk or load.whole
    return _cost(load, "retain", time, 0, graphs=load.poses, serves=serves, needed=one_chunk)


def rows(load: Load) -> float:
    """About how many bytes the rows of all poses take, each parameter's in the smaller form."""
    alone = load.walked or load.together == 1
    row = load.gradient if alone else min(load.gradient, 2 * (load.graph or 0.0))
    return load.poses * load.components * row


def _store(load: Load) -> Cost:
    alone = load.walked or load.together == 1
    backward = load.backward * load.components * (1 if alone else _ROWS)
    held, graph = rows(load), load.graph or 1.0
    room = int((load.budget - held) // graph)  # for a chunk's graph, beside what is held
    together = 1 if alone else min(load.together, room) if room > 0 else load.together
    time = load.poses * (1 + backward) + load.poses / together * load.extra
    serves = load.early and load.apart
    return _cost(load, "store", time, held, serves=serves, graphs=together)


def _stream(load: Load) -> Cost:
    sums = max(1, load.sums)
    backwards = load.components * (1 if load.together == 1 else sums)
    time = load.poses * (1 + backwards * load.backward) + load.chunks * load.extra
    serves = load.early and load.sums > 0 and load.groups == load.components == 1
    held = sums * load.groups * load.components * load.gradient
    return _cost(load, "stream", time, held, serves=serves, needed=True)


def _recompute(load: Load) -> Cost:
    chunks = load.chunks + min(load.chunks, load.counting)
    time = load.poses + load.again * (1 + load.backward) + chunks * load.extra
    return _cost(load, "recompute", time, load.gradient, serves=True, needed=True)


def _cost(
    load: Load,
    schedule: str,
    time: float,
    held: float,
    *,
    serves: bool,
    graphs: int | None = None,
    needed: bool = False,
) -> Cost:
    """A cost; what is needed in any case counts as fitting."""
    alive = min(load.together, load.poses) if graphs is None else graphs
    kept = None if load.graph is None else held + alive * load.graph
    fits = needed or (kept is not None and kept <= load.budget)
    return Cost(schedule, time, alive, held, kept, serves, fits)
