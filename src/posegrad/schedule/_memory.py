"""How much memory graphs may take, and how much they do: measured once for each kind of pose."""

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

# The fixed part of the work, as the bytes that could be read and written meanwhile: of calling one
# operator, some 5 us, and of what this library does for a chunk, some 400 us.
OPERATOR = 2**13
CHUNK = 80 * OPERATOR

_ENOUGH = 20  # a chunk's graphs should take that many times its fixed part

_NODE = 512  # about the size of a node itself

_STEEP = 4  # measured anew with so many times more poses, since they share a graph's fixed part


def checked_memory(memory: Any, modules: Sequence[nn.Module]) -> int:
    """The number of bytes that the user's argument stands for.

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
    """The measured graphs of some poses.

    Args:
        pose: The mean bytes of a pose.
        graph: The bytes that the graph of one pose keeps.
        nodes: How many operators one forward takes.
        poses: How many poses were measured together.
    """

    pose: float
    graph: float
    nodes: int
    poses: int

    def graph_of(self, pose: float) -> float:
        """The bytes of the graph of a pose of another size.

        A smaller pose is taken to need its share, and needs no more: graphs grow at least in
        proportion. A larger one is taken to need the square of it, as attention does, until such a
        pose is measured.
        """
        share = pose / self.pose
        return self.graph * share * max(1.0, share)

    def tells(self, poses: int, size: float) -> bool:
        """Whether measuring some poses would add nothing."""
        alike = poses < _STEEP * self.poses or size < 0.9 * self.pose
        return alike and size <= 1.001 * self.pose


@final
class Known:
    """What an engine has learned from earlier calls about one kind of pose.

    Attributes:
        measure: What their graphs take, once measured.
        most: How many may be scored together, if a larger number ran out of memory.
        apart: Where poses scored together were seen to stay apart: with graphs or without, and in
            chunks of one shape or of several, which are padded or concatenated.
        picks: Whether single poses of a chunk that the caller has stated may be scored again, for
            chunks of one shape and of several; no entry where nobody has asked.
        compared: Where poses scored again by themselves were seen to have the gradients of their
            whole chunk: in chunks of one shape or of several.
        has_rows: Whether rows may be read off their graphs, as far as is known.
        draws: Whether a forward drew random numbers or wrote to buffers.
        counting: For each rule, how many poses carried weight in the last call, and of how many.
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
        """How many poses with such graphs make a chunk fast enough.

        More would save less than 5 % of the time and hold more; on an accelerator that is unknown.
        """
        if self.measure is None or not self._meter.on_cpu:
            return inf
        return _ENOUGH * (CHUNK + self.measure.nodes * OPERATOR) / max(1.0, graph)

    @property
    def budget(self) -> int:
        """The bytes that graphs may take together."""
        return self._meter.budget

    def is_apart(self, *, stated: bool) -> bool:
        """Whether poses scored together are known to stay apart.

        Args:
            stated: Whether the caller has stated the chunks.
        """
        if stated:
            return self.may_pick() and bool(self.picks)
        return any(with_graph for with_graph, _ in self.apart)

    def may_pick(self) -> bool:
        """Whether nothing speaks against scoring single poses of stated chunks again."""
        return all(self.picks.values())

    def look(self, portion: Portion, predictions: Tensor) -> None:
        """Measures the graph of some poses, unless that would add nothing."""
        size = bytes_of(portion.tensors()) / portion.count
        told = self.measure is not None and self.measure.tells(portion.count, size)
        if told or not size or not predictions.requires_grad:
            return
        own = storages([*self._meter.tensors(), *portion.tensors()])
        if (found := footprint(predictions, own)) is not None:
            kept, nodes = found
            if portion.how == "alone":  # each pose has its own operators, whatever its chunk
                kept += nodes * _NODE
                nodes //= portion.count
            self.measure = Measure(size, kept / portion.count, nodes, portion.count)

    def note_draws(self, draws: bool) -> None:
        """Notes whether a forward drew random numbers or wrote to buffers."""
        self.draws = draws

    def refuse_rows(self) -> None:
        """Notes that rows cannot be read off the graphs."""
        self.has_rows = False

    def shrink(self, poses: int) -> None:
        """Notes that this many poses together ran out of memory."""
        self.most = max(1, poses // 2)
        self._meter.say(
            f"{poses} poses ran out of memory together, so at most {self.most} are scored at once "
            f"from now on.\nEngine(..., memory=...) below {self.budget} bytes saves the attempt."
        )


@final
class Meter:
    """All that an engine has measured.

    Args:
        budget: The bytes that graphs may take together.
        tensors: Lists the parameters and buffers of the models.
        on_cpu: Whether all models were on a CPU.
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
        """What is known of one kind of pose."""
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = Known(self)
        return known

    def say(self, message: str) -> None:
        """Warns, but only once."""
        if not self._said:
            self._said = True
            warn(message)
