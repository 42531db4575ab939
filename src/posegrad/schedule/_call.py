"""What a call asks for: how an engine runs poses, the poses, the rule, the caller's wishes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from posegrad._compat import has_hooks
from posegrad.capture import check_no_talk
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Grouped, Groups
from posegrad.errors import NoPosesError, RankError, ShapeMismatchError, listed
from posegrad.ranks import Ranks
from posegrad.schedule._chunks import ChunkSize, checked, in_chunks
from posegrad.schedule._plan import Plan, Request, choose, chunks_in, count_of, describe
from posegrad.schedule._poses import Pose, check_poses, each_pose
from posegrad.schedule._replay import scales_float16
from posegrad.schedule._session import Scorer
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["Call", "Setting"]


@dataclass(frozen=True)
class Call:
    """One call of combine, as far as it is settled before a pose is scored.

    Args:
        scorer: How poses are scored.
        chunks: The poses of this rank.
        request: What the choice of a schedule looks at; its rule is that for all groups.
        groups: Of this rank's poses, if there are several groups.
        named: The model's parameters.
        has_hooks: Whether a parameter of the model or the rule has some, on any rank. All poses are
            scored with graphs then: only these tell whether plain autograd would run them.
        ranks: Who make this call together, if the group is shared.
    """

    scorer: Scorer
    chunks: Iterator[list[Pose]]
    request: Request
    groups: Groups | None
    named: Mapping[str, nn.Parameter]
    has_hooks: bool
    ranks: Ranks | None = None


class Setting:
    """How an engine runs poses.

    Args:
        modules: The models.
        predict: Called as `predict(*modules, pose)`.
        collate: Joins poses into what it takes.
        chunk_size: How many are joined.
        ranks: Who share every group of poses, if anyone does.
        named: Looks up the model's parameters; raises what forbids a call, such as a closed engine.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        predict: Callable[..., Tensor] | None,
        collate: Callable[[list[Pose]], Any] | None,
        chunk_size: ChunkSize,
        ranks: Ranks | None,
        named: Callable[[], Mapping[str, nn.Parameter]],
    ) -> None:
        self._modules = modules
        self._predict = predict
        self._collate = collate
        self._chunk_size = checked(chunk_size)
        self._ranks = ranks
        self._named = named

    def call(
        self,
        poses: Iterable[Pose] | Tensor,
        rule: Rule,
        groups: Tensor | Sequence[int] | None,
        schedule: str,
        skip_below: float,
    ) -> Call:
        """What one call of `Engine.combine` asks for; its arguments are as there.

        Raises:
            RankError: if ranks want different things.
            NoPosesError: if there are no poses, or a group is empty.
            ShapeMismatchError, TypeError, ValueError: as `Engine.combine`.
        """
        ranks, alone = self._ranks, self._ranks is None

        def own() -> Call:
            named = self._named()
            if ranks is not None:
                check_no_talk(self._modules, sharded=ranks.sharded)
            scorer = self.scorer(poses)
            count, chunks = self.chunks(poses, may_be_none=not alone)
            of_own = _groups_of(groups, poses, all_here=alone)
            whole = _rule_of(rule, of_own if alone else None)
            request = self._request(whole, schedule, skip_below, count)
            hooked = any(map(has_hooks, chain(named.values(), whole.parameters())))
            return Call(scorer, chunks, request, of_own, named, hooked)

        return own() if ranks is None else _together(ranks, own)

    def plan(
        self,
        poses: object,
        rule: Rule,
        groups: Tensor | Sequence[int] | None,
        schedule: str,
        skip_below: float,
        parameters: Iterable[Tensor],
    ) -> Plan:
        """What such a call would do, for poses that have a length."""
        self._how_scored()
        check_poses(poses)
        count = count_of(poses)
        chunks = chunks_in(poses, count, self._chunk_size)
        whole = _rule_of(rule, _groups_of(groups, poses, all_here=self._ranks is None))
        request = self._request(whole, schedule, skip_below, chunks)
        return describe(request, count, chunks, parameters)

    def scorer(self, poses: Iterable[Pose] | Tensor) -> Scorer:
        """How these poses are scored.

        Raises:
            PosesError: if they are a mapping or a graph.
            ShapeMismatchError: if they are a tensor without rows.
            ValueError: if they must be joined, or pass through several modules, and nobody said
                how.
        """
        predict = self._how_scored()
        check_poses(poses)
        if isinstance(poses, Tensor) and poses.ndim == 0:
            raise ShapeMismatchError(
                "The poses are a tensor without dimensions; its rows would be the poses.\n"
                "Pass a stacked tensor [m, ...] or a list of poses."
            )
        collate = self._collate
        if collate is None and self._chunk_size != 1:
            if not isinstance(poses, Tensor):
                raise ValueError(
                    f"chunk_size is {self._chunk_size} and the poses come as a "
                    f"{type(poses).__name__}, so the engine must know how to join them. Pass "
                    f"Engine(..., collate=torch.stack), PyG's Batch.from_data_list, or a stacked "
                    f"tensor of poses."
                )
            collate = torch.stack
        return Scorer(self._modules, predict, collate)

    def chunks(
        self, poses: Iterable[Pose] | Tensor, *, may_be_none: bool = False
    ) -> tuple[int, Iterator[list[Pose]]]:
        """The poses in chunks, and whether these are one or more (1 or 2).

        Args:
            poses: As users state them.
            may_be_none: Whether other ranks may have poses where this one has none.

        Raises:
            NoPosesError: if there are none.
        """
        chunks = in_chunks(each_pose(poses), self._chunk_size)
        opening = list(islice(chunks, 2))
        if not opening and not may_be_none:
            raise NoPosesError(
                "There are no poses: a combination of none is undefined.\n"
                "Leave compounds without poses out of the loop. A generator that was used once is "
                "empty: make a list of it."
            )
        return len(opening), chain(opening, chunks)

    def _how_scored(self) -> Callable[..., Any]:
        """What the modules and a pose are handed to."""
        if self._predict is None and len(self._modules) > 1:
            raise ValueError(
                f"The engine has {len(self._modules)} modules and cannot know how a pose passes "
                f"through them.\nPass Engine(..., predict=lambda first, second, pose: ...). "
                f"Outputs that you hand to jacobian() or backward() need none."
            )
        return self._predict or nn.Module.__call__

    def _request(self, rule: Combination, schedule: str, skip_below: float, chunks: int) -> Request:
        return Request(
            rule,
            schedule,
            skip_below,
            one_chunk=chunks == 1,
            scales_float16=scales_float16(self._modules),
            shared=self._ranks is not None,
            sharded=self._ranks is not None and self._ranks.sharded,
        )


def _together(ranks: Ranks, make: Callable[[], Call]) -> Call:
    """The call that all ranks make; `make` makes this rank's, with the rule for one group."""
    calls: list[Call] = []

    def told() -> tuple[int, dict[str, object], Groups | None, bool]:
        call = make()
        calls.append(call)
        outline = call.request.outline() | {
            "chosen schedule": choose(call.request)[0],
            "groups": "none" if call.groups is None else "given",
            "weights of the rule": _weights(call.request),
            "trained parameters": ranks.fingerprint.of(call.named.items()),
            "trained parameters of the rule": ranks.fingerprint.of(
                call.request.rule.named_parameters()
            ),
        }
        return ranks.next_call(), outline, call.groups, call.has_hooks

    numbers, outlines, groups, hooked = zip(*ranks.together("combine", told), strict=True)
    _check_agreed(outlines)
    (call,) = calls
    call = replace(call, ranks=ranks.in_call(numbers), has_hooks=any(hooked))
    if call.groups is None:
        return call
    joined = Groups.joined(groups)
    return replace(
        call,
        request=replace(call.request, rule=Grouped(call.request.rule, joined)),
        groups=replace(call.groups, count=joined.count),
    )


def _weights(request: Request) -> str:
    """How the rule's weights separate: running sums of ranks add up only if they do alike."""
    form = request.form()
    return "found at the end" if form is None else f"{type(form).__name__} {vars(form)}"


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


def _groups_of(
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


def _rule_of(rule: Rule, groups: Groups | None) -> Combination:
    """The rule of one call: for several groups, applied to each.

    Raises:
        TypeError: if it is no rule of predictions.
    """
    rule = rule_of_predictions(rule)
    return rule if groups is None else Grouped(rule, groups)
