"""One call of combine: from poses and a rule to the schedule that runs."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.combination._base import outcome
from posegrad.combination._groups import ungrouped
from posegrad.errors import (
    NotDifferentiableError,
    ReentrantCheckpointError,
    UnsupportedModuleError,
)
from posegrad.graph import Gatherer, check_no_talk
from posegrad.schedule._call import Call
from posegrad.schedule._chunks import Portion
from posegrad.schedule._cost import rows
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._plan import Request, choose
from posegrad.schedule._replay import Start
from posegrad.schedule._session import DETACHED, Combined, Session
from posegrad.schedule.recompute import recompute
from posegrad.schedule.retain import retain
from posegrad.schedule.store import store
from posegrad.schedule.stream import stream

__all__ = ["run"]


@restoring
def run(make: Callable[[], Call], gatherer: Gatherer, *, wary: bool) -> tuple[Combined, bool]:
    """Scores poses under the schedule a call leads to.

    Args:
        make: Makes the call: the poses, the rule, and the caller's wishes.
        gatherer: Reads Jacobians for `store`.
        wary: Whether to score all poses with graphs.

    Returns:
        The result, and whether the poses' graphs were looked at.

    Raises:
        UnsupportedModuleError: if processes talk to each other in a forward.
    """
    # torch 2.10 takes casts that a forward without a graph has left for a forward with one.
    torch.clear_autocast_cache()
    call = make()
    if choose(call.request) != "store" or call.request.schedule != "auto":
        return _run(call, gatherer, wary=wary)
    start = Start(call.named.values(), call.parts)
    try:
        return _run(call, gatherer, wary=wary)
    except (UnsupportedModuleError, ReentrantCheckpointError):
        start.put_back()  # other schedules serve graphs whose rows cannot be read
        call.division.known.has_rows = False
    return _run(make(), gatherer, wary=wary)


def _run(call: Call, gatherer: Gatherer, *, wary: bool) -> tuple[Combined, bool]:
    """One attempt."""
    request, ranks = call.request, call.ranks
    name = choose(request)
    wary |= call.has_hooks
    differentiates = torch.is_grad_enabled() or request.sharded
    portions = call.portions(
        light=name in ("stream", "recompute") and differentiates,
        whole=name == "retain",
        reserved=rows(request.load) if name == "store" and request.measured else 0.0,
    )
    if name == "retain" or not differentiates:
        combined, portions = _retained(call, portions)
        if combined is not None:
            return combined, False
        request = request.told(one_chunk=False, measured=False)
        name = choose(request)
    if ranks is None:
        check_no_talk(call.scorer.modules, sharded=False)
    session = Session(
        call.scorer,
        portions,
        Inputs(call.named, ranks, call.parts),
        wary=wary,
        ranks=ranks,
        groups=call.groups,
        known=None if request.sharded else call.division.known,
        halves=not call.division.is_stated,
    )
    if name in ("stream", "store"):
        name = choose(_informed(request, session))
    if name == "stream":
        return stream(session, request.rule), True
    if name == "store":
        return store(session, request.rule, gatherer), True
    are_apart = partial(_are_apart, call)
    found = recompute(session, request.rule, skip_below=request.skip_below, are_apart=are_apart)
    return found, True


def _are_apart(call: Call, portion: Portion) -> bool:
    """Whether poses of a chunk stay apart: as seen in one that may be divided, else as proved."""
    known = call.division.known
    if not call.division.is_stated:
        return (True, portion.is_ragged()) in known.apart
    return call.apart.proves(portion, known, call.scorer)


def _retained(call: Call, portions: Iterator[Portion]) -> tuple[Combined | None, Iterator[Portion]]:
    """The result of plain autograd; or None if that ran out of memory, and smaller chunks."""
    known = call.division.known
    if not call.division.may_overrun or call.ranks is not None:
        return _plainly(call, portions), portions
    if not torch.is_grad_enabled():
        return _plainly(call, portions, partial(_in_parts, call)), portions
    if not (call.division.one_chunk or call.division.whole):
        return _plainly(call, portions), portions
    chunk = next(portions)
    start = Start(call.named.values(), call.parts)
    try:
        return _plainly(call, chain([chunk], portions)), portions
    except torch.OutOfMemoryError:
        if chunk.count < 2:
            raise
    start.put_back()
    known.shrink(chunk.count)
    return None, chain(chunk.halves(), portions)


def _in_parts(call: Call, portion: Portion, number: int) -> Iterator[Tensor]:
    """The predictions of a chunk, or of its halves if it ran out of memory; no graph is kept."""
    start = Start(call.named.values(), call.parts)
    found = None
    try:
        found = call.scorer(portion, number)
    except torch.OutOfMemoryError:
        if portion.count < 2:
            raise
    if found is not None:
        yield found
        return
    start.put_back()
    call.division.known.shrink(portion.count)
    for half in portion.halves():
        yield from _in_parts(call, half, number)
        number += half.count


def _plainly(
    call: Call,
    portions: Iterator[Portion],
    sparing: Callable[[Portion, int], Iterator[Tensor]] | None = None,
) -> Combined:
    look, rule = call.division.known.look, call.request.rule
    combined = retain(call.scorer, portions, rule, call.ranks, call.groups, look, sparing)
    if torch.is_grad_enabled() and not combined.per_pose.requires_grad:
        _check_needless(call)
    return combined


def _check_needless(call: Call) -> None:
    """Refuses predictions without a graph where there is something to train.

    Raises:
        NotDifferentiableError: if there is.
    """
    if any(p.requires_grad for p in call.named.values()):
        raise NotDifferentiableError(DETACHED)


def _informed(request: Request, session: Session) -> Request:
    """The request with what only a first prediction tells.

    Its size, whether the rule trains something or returns more than streaming differentiates, and
    whether the model casts to float16 by itself.
    """
    rule, streams = ungrouped(request.rule), choose(request) == "stream"

    def told() -> tuple[int, bool, bool]:
        first = session.first()
        if first is None:
            return 1, False, False  # the poses are on other ranks
        with torch.enable_grad():  # a rule that streams takes any number of poses
            trained = streams and _needs_graph(rule(first.predictions.detach()))
        return first.predictions[0].numel(), trained, session.has_float16

    ranks = session.ranks
    everyone = [told()] if ranks is None else ranks.together("score the first poses", told)
    components, trained, float16 = zip(*everyone, strict=True)
    return request.told(
        components=max(components),
        rule_is_trained=any(trained),
        scales_float16=request.scales_float16 or any(float16),
    )


def _needs_graph(found: object) -> bool:
    """Whether autograd must see a rule, of which this was returned for detached predictions."""
    prediction, extra = outcome(found)
    return bool(extra) or prediction.requires_grad
