"""Schedule `retain`: keep every graph. The reference, and the fastest for one chunk."""

from posegrad.combination import Combination
from posegrad.schedule._predictions import group_predictions, shared_predictions
from posegrad.schedule._result import Combined
from posegrad.schedule._run import Run

__all__ = ["retain"]


def retain(run: Run, rule: Combination) -> Combined:
    """Plain autograd: m forwards, then one backward through all m graphs.

    Memory: m graphs. Serves any rule, any loss and any order of derivative. Predictions of other
    ranks have no graph here, so a shared group is combined only under `torch.no_grad()`.
    """
    if run.ranks is None:
        per_pose = group_predictions(run.plainly())
    else:
        found, *_ = shared_predictions(run.ranks, run.groups, run.plainly, lambda: None)
        per_pose = found.to(run.scorer.device)
    return Combined.of(rule(per_pose), per_pose)
