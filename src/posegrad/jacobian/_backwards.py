"""How many backwards a Jacobian took, what each was for, and what is to blame for more than one."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import final

from posegrad.errors import listed

__all__ = ["ONE", "Backwards", "Purpose"]


class Purpose(Enum):
    """What a backward is for; a row counts as one, however many are computed together."""

    ACTIVATIONS = "to the activations"
    COMPONENTS = "for the components of the output"
    PROBES = "to find whose rows are whose"
    PULLS = "for rows behind computed tensors"
    ROWS = "for rows of the whole graph"
    CHECK = "to compare with plain autograd"
    SCALE = "to find a scale for float16"


@final
@dataclass
class Backwards:
    """The backwards of one Jacobian, or of several.

    Args:
        counts: By purpose.
        lost: Operators through which poses cannot be followed, by name.
        alone: Operators that were probed by their own backward.
    """

    counts: Counter[Purpose] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    def add(self, purpose: Purpose, count: int = 1) -> None:
        """Counts some more."""
        self.counts[purpose] += count

    def blame(self, lost: Iterable[str] = (), alone: Iterable[str] = ()) -> None:
        """Notes operators, each once."""
        self.lost = list(dict.fromkeys([*self.lost, *lost]))
        self.alone = list(dict.fromkeys([*self.alone, *alone]))

    def joined(self, other: "Backwards") -> "Backwards":
        """Both together."""
        both = Backwards(self.counts + other.counts)
        both.blame([*self.lost, *other.lost], [*self.alone, *other.alone])
        return both

    @property
    def total(self) -> int:
        """How many they are."""
        return self.counts.total()

    def __str__(self) -> str:
        several = [purpose for purpose in Purpose if self.counts[purpose]]
        text = f"{self.total or 'no'} backward" + "s" * (self.total != 1)
        if len(several) == 1:
            text += f" {several[0].value}"
        elif several:
            text += ": " + ", ".join(f"{self.counts[p]} {p.value}" for p in several)
        if self.lost and self.total > 1:
            text += f"; poses cannot be followed through {listed(self.lost)}"
        return text + (f"; probed alone: {listed(self.alone)}" if self.alone else "")


ONE = Backwards(Counter({Purpose.ACTIVATIONS: 1}))
"""What most Jacobians take. Never written to."""
