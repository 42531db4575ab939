"""Schedule `retain`: keep every graph. The reference, and the fastest for one chunk."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor

from posegrad.combination import Combination
from posegrad.combination._groups import Groups
from posegrad.ranks import Ranks
from posegrad.schedule._chunks import Portion
from posegrad.schedule._predictions import group_predictions, shared_predictions
from posegrad.schedule._session import Combined, Scorer

__all__ = ["retain"]


def retain(
    scorer: Scorer,
    chunks: Iterator[Portion],
    rule: Combination,
    ranks: Ranks | None = None,
    groups: Groups | None = None,
    look: Callable[[Portion, Tensor], None] | None = None,
    sparing: Callable[[Portion, int], Iterable[Tensor]] | None = None,
) -> Combined:
    """Plain autograd: m forwards, then one backward through all m graphs.

    Memory: m graphs. Serves any rule, any loss and any order of derivative. Predictions of other
    ranks have no graph here, so a group that is shared is combined under `torch.no_grad()` only.
    `look` is shown each chunk and its predictions; `sparing` scores a chunk in parts if need be.
    """
    score = partial(_scored, sparing or (lambda *chunk: [scorer(*chunk)]), chunks, look)
    if ranks is None:
        per_pose = group_predictions(score())
    else:
        found, *_ = shared_predictions(ranks, groups, score, lambda: None)
        per_pose = found.to(scorer.device)
    return Combined.of(rule(per_pose), per_pose)


def _scored(
    score: Callable[[Portion, int], Iterable[Tensor]],
    chunks: Iterator[Portion],
    look: Callable[[Portion, Tensor], None] | None,
) -> list[Tensor]:
    rows: list[Tensor] = []
    count = 0
    for portion in chunks:
        rows.extend(score(portion, count))
        count += portion.count
        if look is not None:
            look(portion, rows[-1])
    return rows
