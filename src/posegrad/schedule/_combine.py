"""One call of combine: from poses and a rule to the schedule that runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from posegrad.capture import Gatherer, check_no_talk
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Grouped, Groups, ungrouped
from posegrad.errors import NoPosesError, RankError, ShapeMismatchError, listed
from posegrad.ranks import Ranks
from posegrad.schedule._chunks import ChunkSize, in_chunks
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._plan import Request, choose
from posegrad.schedule._poses import Pose, each_pose
from posegrad.schedule._replay import scales_float16
from posegrad.schedule._session import Combined, Scorer, Session
from posegrad.schedule.recompute import recompute
from posegrad.schedule.store import store
from posegrad.schedule.stream import stream
from posegrad.weighting._rules import rule_of_predictions

__all__ = [
    "call_of",
    "check_options",
    "chunks_of",
    "groups_for",
    "request_for",
    "rule_for",
    "run",
    "scorer_for",
]


def scorer_for(
    poses: Iterable[Pose] | Tensor,
    modules: Sequence[nn.Module],
    predict: Callable[..., Any],
    collate: Callable[[list[Pose]], Any] | None,
    chunk_size: ChunkSize,
) -> Scorer:
    """How these poses are scored.

    Raises:
        ShapeMismatchError: if they are a tensor without rows.
        ValueError: if they must be joined and nobody said how.
    """
    if isinstance(poses, Tensor) and poses.ndim == 0:
        raise ShapeMismatchError(
            "The poses are a tensor without dimensions; its rows would be the poses.\n"
            "Pass a stacked tensor [m, ...] or a list of poses."
        )
    if collate is None and chunk_size != 1:
        if not isinstance(poses, Tensor):
            raise ValueError(
                f"chunk_size is {chunk_size} and the poses come as a {type(poses).__name__}, so "
                f"the engine must know how to join them. Pass Engine(..., collate=torch.stack), "
                f"PyG's Batch.from_data_list, or a stacked tensor of poses."
            )
        collate = torch.stack
    return Scorer(modules, predict, collate)


@dataclass(frozen=True)
class Call:
    """One call of combine, as far as it is settled before a pose is scored.

    Args:
        scorer: How poses are scored.
        chunks: The poses of this rank.
        request: What the choice of a schedule looks at; its rule is that for all groups.
        groups: Of this rank's poses, if there are several groups.
    """

    scorer: Scorer
    chunks: Iterator[list[Pose]]
    request: Request
    groups: Groups | None


def check_options(modules: int, predict: object) -> None:
    """Refuses options of an engine that cannot work.

    Raises:
        ValueError: if it has several modules without `predict`.
    """
    if predict is None and modules > 1:
        raise ValueError(
            f"The engine has {modules} modules and cannot know how a pose passes through "
            f"them. Pass predict=lambda first, second, pose: ...."
        )


def call_of(
    scorer: Callable[[], Scorer],
    chunk_size: ChunkSize,
    poses: Iterable[Pose] | Tensor,
    rule: Rule,
    groups: Tensor | Sequence[int] | None,
    schedule: str,
    skip_below: float,
    ranks: Ranks | None,
) -> Call:
    """What one call of combine asks for.

    Args:
        scorer: Says how these poses are scored.
        chunk_size: How many together.
        poses: As for `Engine.combine`, and so the other arguments.
        rule: For one group.
        groups: Of this rank's poses.
        schedule: The one asked for.
        skip_below: Which weights count as zero.
        ranks: Who make the call together, if the group is shared.

    Raises:
        RankError: if ranks want different things.
        NoPosesError: if there are no poses, or a group is empty.
    """
    alone = ranks is None

    def made() -> Call:
        how = scorer()
        count, chunks = chunks_of(poses, chunk_size, may_be_none=not alone)
        own = groups_for(groups, poses, all_here=alone)
        whole = rule_for(rule, own if alone else None)
        request = request_for(whole, schedule, skip_below, count, how.modules)
        return Call(how, chunks, request, own)

    return made() if ranks is None else _together(ranks, made)


def _together(ranks: Ranks, make: Callable[[], Call]) -> Call:
    """The call that all ranks make; `make` makes this rank's, with the rule for one group."""
    calls: list[Call] = []

    def told() -> tuple[dict[str, object], Groups | None]:
        call = make()
        calls.append(call)
        given = {"groups": "none" if call.groups is None else "given"}
        return call.request.outline() | given, call.groups

    outlines, groups = zip(*ranks.together("combine", told), strict=True)
    _check_agreed(outlines)
    (call,) = calls
    request = replace(call.request, shared=True, sharded=ranks.sharded)
    if call.groups is None:
        return replace(call, request=request)
    joined = Groups.joined(groups)
    return replace(
        call,
        request=replace(request, rule=Grouped(request.rule, joined)),
        groups=replace(call.groups, count=joined.count),
    )


def _check_agreed(outlines: Sequence[dict[str, object]]) -> None:
    differing = [
        f"{name} ({', '.join(str(outline[name]) for outline in outlines)})"
        for name in outlines[0]
        if any(outline[name] != outlines[0][name] for outline in outlines)
    ]
    if differing:
        raise RankError(
            f"The ranks of the process group call combine() with different {listed(differing)}.\n"
            f"They share one group of poses and one result, so these must be the same on all."
        )


def chunks_of(
    poses: Iterable[Pose] | Tensor, chunk_size: ChunkSize, *, may_be_none: bool = False
) -> tuple[int, Iterator[list[Pose]]]:
    """The poses in chunks, and whether these are one or more (1 or 2).

    Args:
        poses: As users state them.
        chunk_size: How many poses go into a chunk.
        may_be_none: Whether other ranks may have poses where this one has none.

    Raises:
        NoPosesError: if there are none.
    """
    chunks = in_chunks(each_pose(poses), chunk_size)
    opening = list(islice(chunks, 2))
    if not opening and not may_be_none:
        raise NoPosesError(
            "There are no poses: a combination of none is undefined.\n"
            "Leave compounds without poses out of the loop."
        )
    return len(opening), chain(opening, chunks)


def groups_for(
    groups: Tensor | Sequence[int] | None, poses: object, *, all_here: bool = True
) -> Groups | None:
    """The groups of one call.

    Args:
        groups: As users state them.
        poses: Whose they are.
        all_here: Whether each must have a pose here; it may have some on other ranks.

    Raises:
        NoPosesError: if a group is empty.
        ShapeMismatchError: if there are more or fewer poses than the groups have.
    """
    if groups is None:
        return None
    owners = Groups.of(groups) if all_here else Groups.some_of(groups)
    if isinstance(poses, Sized):
        owners.check(len(poses))
    return owners


def rule_for(rule: Rule, groups: Groups | None) -> Combination:
    """The rule of one call: for several groups, applied to each.

    Raises:
        TypeError: if it is no rule of predictions.
    """
    rule = rule_of_predictions(rule)
    return rule if groups is None else Grouped(rule, groups)


def request_for(
    rule: Combination, schedule: str, skip_below: float, chunks: int, modules: Sequence[nn.Module]
) -> Request:
    """What the choice of a schedule looks at."""
    scales = scales_float16(modules)
    return Request(rule, schedule, skip_below, one_chunk=chunks == 1, scales_float16=scales)


def run(
    call: Call, inputs: Inputs, ranks: Ranks | None, gatherer: Gatherer, *, wary: bool
) -> Combined:
    """Scores poses under the schedule the call leads to, other than `retain`.

    Args:
        call: The poses, the rule, and the caller's wishes.
        inputs: What gradients flow to.
        ranks: Who share the group, if anyone does.
        gatherer: Reads Jacobians for `store`.
        wary: Whether to score all poses with graphs.

    Raises:
        UnsupportedModuleError: if processes talk to each other in a forward.
    """
    check_no_talk(call.scorer.modules, sharded=call.request.sharded)
    session = Session(call.scorer, call.chunks, inputs, wary=wary, ranks=ranks, groups=call.groups)
    request = call.request
    name, _ = choose(request)
    if name == "stream":
        name, _ = choose(_informed(request, session))
    if name == "stream":
        return stream(session, request.rule)
    if name == "store":
        return store(session, request.rule, gatherer)
    return recompute(session, request.rule, skip_below=request.skip_below)


def _informed(request: Request, session: Session) -> Request:
    """The request with what only a first prediction tells: its size, and what the rule trains."""
    rule = ungrouped(request.rule)

    def told() -> tuple[int, bool]:
        first = session.first()
        if first is None:
            return 1, False  # the poses are on other ranks
        with torch.enable_grad():
            trained = rule(first.predictions.detach()).requires_grad
        return first.predictions[0].numel(), trained

    ranks = session.ranks
    everyone = [told()] if ranks is None else ranks.together("score the first poses", told)
    components, trained = zip(*everyone, strict=True)
    return replace(request, components=max(components), rule_is_trained=any(trained))
