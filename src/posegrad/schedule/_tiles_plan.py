"""What it takes to make a Gramian tile by tile."""

from dataclasses import dataclass
from typing import final

from posegrad.jacobian._table import size

__all__ = ["GramianPlan"]


@final
@dataclass(frozen=True)
class GramianPlan:
    """What `Engine.gramian` would do. Prints as a table.

    Args:
        poses: How many there are; `others`: how many they meet, or None if they meet each other.
        blocks: How many blocks they are gathered in; `blocks_of_others`: the same for the others.
        largest: How many poses the largest block has.
        gathers: How many blocks are gathered in all, each for several tiles.
        scored: How many poses that scores.
        bytes_held: What two blocks hold, as measured on the first poses.
        bytes_made: The size of the Gramian.

    Example:
        >>> print(Engine(nn.Linear(999, 1), memory="1MiB").plan_gramian(torch.randn(100, 999)))
        poses    100 in 4 blocks of up to 32
        gathers  7, which score 140 poses
        holds    2 blocks: 250 KiB
        makes    39.1 KiB
    """

    poses: int
    others: int | None
    blocks: int
    blocks_of_others: int | None
    largest: int
    gathers: int
    scored: int
    bytes_held: int
    bytes_made: int

    def __str__(self) -> str:
        rows = {"poses": f"{self.poses} in {_blocks(self.blocks)} of up to {self.largest}"}
        if self.others is not None and self.blocks_of_others is not None:
            rows["others"] = f"{self.others} in {_blocks(self.blocks_of_others)}"
        held = 1 if self.others is None and self.blocks == 1 else 2
        rows |= {
            "gathers": f"{self.gathers}, which score {self.scored} poses",
            "holds": f"{_blocks(held)}: {size(self.bytes_held * held // 2)}",
            "makes": size(self.bytes_made),
        }
        return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def _blocks(count: int) -> str:
    return f"{count} block" + "s" * (count != 1)
