"""How much graphs may take, and what they take: measured once for each kind of pose."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, final

from torch import Tensor, nn

from posegrad._torch import free_memory
from posegrad._warn import warn
from posegrad.graph import footprint, storages
from posegrad.schedule._chunks import Portion
from posegrad.schedule._poses import bytes_of
from posegrad.schedule._replay import accelerators

__all__ = ["CHUNK", "OPERATOR", "Known", "Measure", "Meter", "checked_memory"]

_ON_A_CPU = 2**30

_UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}

# Work in bytes that are written and read, as far as it does not grow with the poses: a call of one
# operator, and what this library does for a chunk, some 5 and 400 us.
OPERATOR = 2**13
CHUNK = 80 * OPERATOR

_ENOUGH = 20  # times that, in a chunk's graphs

_NODE = 512  # bytes of a node itself, about

_STEEP = 4  # so many times the poses share what a graph keeps but once


def checked_memory(memory: Any, modules: Sequence[nn.Module]) -> int:
    """A number of bytes, from what users state.

    Args:
        memory: A number, a text such as `"2GiB"`, or `"auto"`: on an accelerator half of what is
            free there, on a CPU 1 GiB.
        modules: The models.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(memory, str) and memory == "auto":
        free = [free_memory(device) for device in accelerators(modules)]
        told = [number for number in free if number is not None]
        return min(told) // 2 if told else _ON_A_CPU
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]+)\s*", memory)
        if found and found[2].lower() in _UNITS:
            memory = int(float(found[1]) * _UNITS[found[2].lower()])
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise ValueError(
            f"memory is {memory!r}, but it must be a number of bytes from 1, a text such as "
            f"'2GiB', or 'auto'."
        )
    return memory


@final
@dataclass(frozen=True)
class Measure:
    """What the graphs of some poses took.

    Args:
        pose: The bytes of a pose, in their mean.
        graph: The bytes that its graph keeps.
        nodes: How many operators one forward takes.
        poses: How many were measured together.
    """

    pose: float
    graph: float
    nodes: int
    poses: int

    def graph_of(self, pose: float) -> float:
        """The bytes of the graph of a pose of another size.

        Of a smaller one no more than in proportion, as graphs grow at least so. Of a larger one as
        the square, which is as much as attention takes, until one like it is measured.
        """
        share = pose / self.pose
        return self.graph * share * max(1.0, share)

    def tells(self, poses: int, size: float) -> bool:
        """Whether to measure some poses would say no more than this does."""
        alike = poses < _STEEP * self.poses or size < 0.9 * self.pose
        return alike and size <= 1.001 * self.pose


@final
class Known:
    """What an engine knows of poses of one kind, from the calls before.

    Attributes:
        measure: What their graphs take, once that was measured.
        most: How many may be scored together, if more ran out of memory.
        apart: Where poses that are scored together were seen to stay apart: with graphs or without,
            and in chunks of one shape or of several, which are padded or follow one another.
        picks: Whether poses of a chunk that the caller has stated may be scored again by
            themselves, in chunks of one shape or of several; without entry where nobody has asked.
        compared: Where gradients of poses that were scored again by themselves were seen to be
            those of their whole chunk: in chunks of one shape or of several.
        has_rows: Whether rows may be read off their graphs, as far as is known.
        draws: Whether a forward drew random numbers or wrote to buffers.
        counting: For each rule how many poses carried weight in the last call, and of how many.
    """

    def __init__(self, meter: "Meter") -> None:
        self.measure: Measure | None = None
        self.most: int | None = None
        self.apart: set[tuple[bool, bool]] = set()
        self.picks: dict[bool, bool] = {}
        self.compared: set[bool] = set()
        self.has_rows = True
        self.draws = False
        self.counting: dict[Hashable, tuple[int, int]] = {}
        self._meter = meter

    def worth(self, graph: float) -> float:
        """How many poses of such graphs in a chunk are enough.

        More would save less than 5 % of the time, and hold more; on an accelerator nobody knows.
        """
        if self.measure is None or not self._meter.on_cpu:
            return inf
        return _ENOUGH * (CHUNK + self.measure.nodes * OPERATOR) / max(1.0, graph)

    @property
    def budget(self) -> int:
        """The bytes that graphs may take together."""
        return self._meter.budget

    def is_apart(self, *, stated: bool) -> bool:
        """Whether poses that are scored together are known to stay apart.

        Args:
            stated: Whether the caller has said how many these are.
        """
        if stated:
            return self.may_pick() and bool(self.picks)
        return any(with_graph for with_graph, _ in self.apart)

    def may_pick(self) -> bool:
        """Whether nothing speaks against scoring poses of stated chunks again by themselves."""
        return all(self.picks.values())

    def look(self, portion: Portion, predictions: Tensor) -> None:
        """Measures the graph of some poses, unless that would say nothing new."""
        size = bytes_of(portion.tensors()) / portion.count
        told = self.measure is not None and self.measure.tells(portion.count, size)
        if told or not size or not predictions.requires_grad:
            return
        own = storages([*self._meter.tensors(), *portion.tensors()])
        if (found := footprint(predictions, own)) is not None:
            kept, nodes = found
            if portion.how == "alone":  # each has operators of its own, however many are a chunk
                kept += nodes * _NODE
                nodes //= portion.count
            self.measure = Measure(size, kept / portion.count, nodes, portion.count)

    def note_draws(self, draws: bool) -> None:
        """Notes whether a forward drew random numbers or wrote to buffers."""
        self.draws = draws

    def refuse_rows(self) -> None:
        """Notes that rows cannot be read off their graphs."""
        self.has_rows = False

    def shrink(self, poses: int) -> None:
        """Notes that so many poses ran out of memory together."""
        self.most = max(1, poses // 2)
        self._meter.say(
            f"{poses} poses ran out of memory together, so at most {self.most} are scored at once "
            f"from now on.\nEngine(..., memory=...) below {self.budget} bytes saves the attempt."
        )


@final
class Meter:
    """What an engine has measured.

    Args:
        budget: The bytes that graphs may take together.
        tensors: Lists the parameters and buffers of the models.
        on_cpu: Whether these were all on a CPU.
    """

    def __init__(
        self, budget: int, tensors: Callable[[], Iterable[Tensor]], *, on_cpu: bool
    ) -> None:
        self.budget = budget
        self.on_cpu = on_cpu
        self.tensors = tensors
        self._known: dict[Hashable, Known] = {}
        self._said = False

    def of(self, kind: Hashable) -> Known:
        """What is known of a kind of pose."""
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = Known(self)
        return known

    def say(self, message: str) -> None:
        """Warns, the first time."""
        if not self._said:
            self._said = True
            warn(message)
