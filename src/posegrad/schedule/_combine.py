"""One call of combine: from poses and a rule to the schedule that runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from posegrad.capture import Gatherer
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Grouped, Groups, ungrouped
from posegrad.errors import NoPosesError, ShapeMismatchError
from posegrad.schedule._plan import Request, choose
from posegrad.schedule._poses import Pose, each_pose, in_chunks
from posegrad.schedule._replay import scales_float16
from posegrad.schedule._session import Combined, Scorer, Session
from posegrad.schedule.recompute import recompute
from posegrad.schedule.store import store
from posegrad.schedule.stream import stream
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["chunks_of", "request_for", "rule_for", "run", "scorer_for"]


def scorer_for(
    poses: Iterable[Pose] | Tensor,
    modules: Sequence[nn.Module],
    predict: Callable[..., Any],
    collate: Callable[[list[Pose]], Any] | None,
    chunk_size: int,
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
    if collate is None and chunk_size > 1:
        if not isinstance(poses, Tensor):
            raise ValueError(
                f"chunk_size is {chunk_size} and the poses come as a {type(poses).__name__}, so "
                f"the engine must know how to join them. Pass Engine(..., collate=torch.stack), "
                f"PyG's Batch.from_data_list, or a stacked tensor of poses."
            )
        collate = torch.stack
    return Scorer(modules, predict, collate, chunk_size)


def chunks_of(poses: Iterable[Pose] | Tensor, size: int) -> tuple[int, Iterator[list[Pose]]]:
    """The poses in chunks, and whether these are one or more (1 or 2).

    Raises:
        NoPosesError: if there are none.
    """
    chunks = in_chunks(each_pose(poses), size)
    opening = list(islice(chunks, 2))
    if not opening:
        raise NoPosesError(
            "There are no poses: a combination of none is undefined.\n"
            "Leave compounds without poses out of the loop."
        )
    return len(opening), chain(opening, chunks)


def rule_for(rule: Rule, groups: Tensor | Sequence[int] | None, poses: object) -> Combination:
    """The rule of one call: for several groups, applied to each.

    Raises:
        TypeError: if it is no rule of predictions.
        NoPosesError: if a group is empty.
        ShapeMismatchError: if there are more or fewer poses than the groups have.
    """
    rule = rule_of_predictions(rule)
    if groups is None:
        return rule
    owners = Groups.of(groups)
    if isinstance(poses, Sized):
        owners.check(len(poses))
    return Grouped(rule, owners)


def request_for(
    rule: Combination, schedule: str, skip_below: float, chunks: int, modules: Sequence[nn.Module]
) -> Request:
    """What the choice of a schedule looks at."""
    scales = scales_float16(modules)
    return Request(rule, schedule, skip_below, one_chunk=chunks == 1, scales_float16=scales)


def run(session: Session, request: Request, gatherer: Gatherer) -> Combined:
    """Scores the poses of a session under the schedule the request leads to, other than `retain`.

    Args:
        session: The poses, and how they are scored.
        request: The rule and the caller's wishes.
        gatherer: Reads Jacobians for `store`.
    """
    name, _ = choose(request)
    if name in ("stream", "store"):
        session.first()  # shows whether the model casts to float16 by itself
        request = replace(request, scales_float16=request.scales_float16 or session.has_float16)
        name, _ = choose(request)
    if name == "stream":
        name, _ = choose(_informed(request, session.first().predictions))
    if name == "stream":
        return stream(session, request.rule)
    if name == "store":
        return store(session, request.rule, gatherer)
    return recompute(session, request.rule, skip_below=request.skip_below)


def _informed(request: Request, predictions: Tensor) -> Request:
    """The request with what only a first prediction tells: its size, and what the rule trains."""
    rule = ungrouped(request.rule)
    with torch.enable_grad():
        trained = rule(predictions.detach()).requires_grad
    return replace(request, components=predictions[0].numel(), rule_is_trained=trained)
