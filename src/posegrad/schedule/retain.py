"""Schedule `retain`: keep every graph. The reference, and the fastest for one chunk."""

from collections.abc import Iterator

from torch import Tensor

from posegrad.combination import Combination
from posegrad.schedule._poses import Pose
from posegrad.schedule._session import Combined, Scorer, group_predictions

__all__ = ["retain"]


def retain(scorer: Scorer, chunks: Iterator[list[Pose]], rule: Combination) -> Combined:
    """Plain autograd: m forwards, then one backward through all m graphs.

    Memory: m graphs. Serves any rule, any loss and any order of derivative.
    """
    rows: list[Tensor] = []
    count = 0
    for poses in chunks:
        rows.append(scorer(poses, count))
        count += len(poses)
    per_pose = group_predictions(rows)
    return Combined(rule(per_pose), per_pose)
