"""From a call to the schedule that runs."""

from collections.abc import Callable

import torch

from posegrad._restoring import restoring
from posegrad.combination import Combination
from posegrad.combination._base import outcome
from posegrad.combination._groups import ungrouped
from posegrad.errors import (
    NotDifferentiableError,
    ReentrantCheckpointError,
    UnsupportedModuleError,
)
from posegrad.graph import Gatherer
from posegrad.model import check_no_talk
from posegrad.schedule._call import Call
from posegrad.schedule._cost import rows
from posegrad.schedule._plan import Request, choose
from posegrad.schedule._replay import Start
from posegrad.schedule._result import Combined
from posegrad.schedule._run import DETACHED, HalvedError, Run
from posegrad.schedule.recompute import recompute
from posegrad.schedule.retain import retain
from posegrad.schedule.store import store
from posegrad.schedule.stream import stream

__all__ = ["combine"]

Schedule = Callable[[Run, Combination], Combined]

_SCHEDULES: dict[str, Schedule] = {
    schedule.__name__: schedule for schedule in (retain, store, stream, recompute)
}


@restoring
def combine(make: Callable[[], Call], gatherer: Gatherer) -> Combined:
    """Scores poses under the schedule that the call leads to.

    Args:
        make: Makes the call; again if the first schedule turns out not to work.
        gatherer: Reads Jacobians for `store`.

    Raises:
        UnsupportedModuleError: if ranks exchange data during a forward.
    """
    # torch 2.10 reuses casts made in a forward without a graph in one that has a graph.
    torch.clear_autocast_cache()
    call = make()
    if choose(call.request) != "store" or call.request.schedule != "auto":
        return _attempt(call, gatherer)
    start = Start(call.named.values(), call.options.roster.parts())
    try:
        return _attempt(call, gatherer)
    except (UnsupportedModuleError, ReentrantCheckpointError):
        start.put_back()  # other schedules can do without readable rows
        call.division.known.refuse_rows()
    return _attempt(make(), gatherer)


def _attempt(call: Call, gatherer: Gatherer) -> Combined:
    """One attempt."""
    request = call.request
    name = choose(request)
    differentiates = torch.is_grad_enabled() or request.sharded
    portions = call.options.portions(
        call.division,
        light=name in ("stream", "recompute") and differentiates,
        whole=name == "retain",
        reserved=rows(request.load) if name == "store" and request.measured else 0.0,
    )
    run = Run(call, gatherer, portions)
    if name == "retain" or not differentiates:
        combined = _plain(run, request.rule)
        if combined is not None:
            return combined
        request = request.told(one_chunk=False, measured=False)
        name = choose(request)
    if call.ranks is None:
        check_no_talk(call.options.modules, sharded=False)
    if name in ("stream", "store"):
        name = choose(_informed(request, run))
    combined = _SCHEDULES[name](run, request.rule)
    call.options.trust()
    return combined


def _plain(run: Run, rule: Combination) -> Combined | None:
    """The result of plain autograd; None if its one chunk ran out of memory and was halved."""
    try:
        combined = retain(run, rule)
    except HalvedError:
        return None
    if torch.is_grad_enabled() and not combined.per_pose.requires_grad:
        _check_needless(run.call)
    return combined


def _check_needless(call: Call) -> None:
    """Refuses predictions without a graph if there is something to train.

    Raises:
        NotDifferentiableError: if there is.
    """
    if any(p.requires_grad for p in call.named.values()):
        raise NotDifferentiableError(DETACHED)


def _informed(request: Request, run: Run) -> Request:
    """The request, with what only a first prediction tells.

    This is its size, whether the rule trains something or returns more than streaming
    differentiates, and whether the model itself casts to float16.
    """
    rule, streams = ungrouped(request.rule), choose(request) == "stream"

    def told() -> tuple[int, bool, bool]:
        first = run.first()
        if first is None:
            return 1, False, False  # the poses are on other ranks
        with torch.enable_grad():  # a rule that streams takes any number of poses
            trained = streams and _needs_graph(rule(first.predictions.detach()))
        return first.predictions[0].numel(), trained, run.has_float16

    everyone = [told()] if run.ranks is None else run.ranks.together("score the first poses", told)
    components, trained, float16 = zip(*everyone, strict=True)
    return request.told(
        components=max(components),
        rule_is_trained=any(trained),
        scales_float16=request.scales_float16 or any(float16),
    )


def _needs_graph(found: object) -> bool:
    """Whether autograd must see a rule, given what it returned for detached predictions."""
    prediction, extra = outcome(found)
    return bool(extra) or prediction.requires_grad
