"""How many backwards a Jacobian took, what each was for, and why if more than one."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import final

from posegrad.errors import listed

__all__ = ["ONE", "TOGETHER", "Backwards", "Purpose"]


class Purpose(Enum):
    """What a backward is for. Each row counts as one, unless all are computed together."""

    ACTIVATIONS = "to the activations"
    COMPONENTS = "for the components of the output"
    PROBES = "to find whose rows are whose"
    PULLS = "for rows behind computed tensors"
    ROWS = "for rows of the whole graph"
    TOGETHER = "for all rows of the whole graph together"
    CHECK = "to compare with plain autograd"
    SCALE = "to find a scale for float16"


@final
@dataclass
class Backwards:
    """Counts the backwards of one or several Jacobians.

    Args:
        counts: By purpose.
        lost: Operators through which poses cannot be followed, by name.
        alone: Operators that were probed by their own backward.
    """

    counts: dict[Purpose, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    def add(self, purpose: Purpose, count: int = 1) -> None:
        """Counts more backwards."""
        self.counts[purpose] = self.counts.get(purpose, 0) + count

    def blame(self, lost: Iterable[str] = (), alone: Iterable[str] = ()) -> None:
        """Notes operators, each once."""
        self.lost += [name for name in dict.fromkeys(lost) if name not in self.lost]
        self.alone += [name for name in dict.fromkeys(alone) if name not in self.alone]

    def joined(self, other: "Backwards") -> "Backwards":
        """The sum of both."""
        both = Backwards(dict(self.counts), [*self.lost], [*self.alone])
        for purpose, count in other.counts.items():
            both.add(purpose, count)
        both.blame(other.lost, other.alone)
        return both

    @property
    def total(self) -> int:
        """The number of backwards."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        several = [purpose for purpose in Purpose if self.counts.get(purpose)]
        text = f"{self.total or 'no'} backward" + "s" * (self.total != 1)
        if len(several) == 1:
            text += f" {several[0].value}"
        elif several:
            text += ": " + ", ".join(f"{self.counts[p]} {p.value}" for p in several)
        if self.lost and self.total > 1:
            text += f"; poses cannot be followed through {listed(self.lost)}"
        return text + (f"; probed alone: {listed(self.alone)}" if self.alone else "")


ONE = Backwards({Purpose.ACTIVATIONS: 1})
"""What most Jacobians take. Never written to."""

TOGETHER = Backwards({Purpose.TOGETHER: 1})
"""What Jacobians of small networks take. Never written to."""
