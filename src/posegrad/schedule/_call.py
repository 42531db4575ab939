"""What a call asks for: how an engine runs poses, the poses, the rule, the caller's wishes."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from posegrad._torch import has_hooks
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Grouped, Groups
from posegrad.errors import NoPosesError, RankError, listed
from posegrad.graph import check_no_talk
from posegrad.jacobian._record import record
from posegrad.ranks import Ranks
from posegrad.schedule._apart import Apart
from posegrad.schedule._batch import Batch, as_batch
from posegrad.schedule._chunks import ChunkSize, Portion, checked
from posegrad.schedule._division import Ahead, Division, Sliced, Walked
from posegrad.schedule._memory import Meter, checked_memory
from posegrad.schedule._plan import Plan, Request, choose, count_to_plan, describe
from posegrad.schedule._poses import Pose, tensors_of
from posegrad.schedule._replay import accelerators, scales_float16
from posegrad.schedule._session import Scorer
from posegrad.schedule._work import name_of, work_of
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["Call", "Setting"]


@record
class Call:
    """One call of combine, as far as it is settled before a pose is scored.

    Args:
        scorer: How poses are scored.
        portions: The poses of this rank, forward by forward, as `Division.portions`.
        division: How they are divided.
        request: What the choice of a schedule looks at; its rule is that for all groups.
        groups: Of this rank's poses, if there are several groups.
        named: The model's parameters.
        parts: All modules of the model.
        has_hooks: Whether a parameter of the model or the rule has some, on any rank. All poses are
            scored with graphs then: only these tell whether plain autograd would run them.
        apart: Tells whether poses stay apart.
        ranks: Who make this call together, if the group is shared.
    """

    scorer: Scorer
    portions: Callable[..., Iterator[Portion]]
    division: Division
    request: Request
    groups: Groups | None
    named: Mapping[str, nn.Parameter]
    parts: Sequence[nn.Module]
    has_hooks: bool
    apart: Apart
    ranks: Ranks | None = None

    def told(self, **more: Any) -> "Call":
        """The same with more told."""
        return Call(**vars(self) | more)


class Setting:
    """How an engine runs poses.

    Args:
        modules: The models.
        predict: Called as `predict(*modules, pose)`.
        collate: Joins poses into what it takes.
        chunk_size: How many are joined.
        memory: The bytes that graphs may take together.
        ranks: Who share every group of poses, if anyone does.
        named: Looks up the model's parameters; raises what forbids a call.
        parts: Lists all modules inside, once that was asked.

    Raises:
        ValueError: if `chunk_size` or `memory` is none.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        predict: Callable[..., Tensor] | None,
        collate: Callable[[list[Pose]], Any] | None,
        chunk_size: ChunkSize,
        memory: Any,
        ranks: Ranks | None,
        named: Callable[[], Mapping[str, nn.Parameter]],
        parts: Callable[[], Sequence[nn.Module]],
    ) -> None:
        self._modules = modules
        self._predict = predict
        self._collate = collate
        self._chunk_size = checked(chunk_size)
        self._ranks = ranks
        self._named = named
        self._parts = parts
        self._apart = Apart(modules, named, parts, self._tensors)
        self.memory = checked_memory(memory, modules)
        self._meter = Meter(self.memory, self._tensors, on_cpu=not accelerators(modules))

    @property
    def stated_chunk(self) -> int:
        """How many poses are scored together, if the caller has said; else 1."""
        return self._chunk_size if isinstance(self._chunk_size, int) else 1

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
            scorer = self.scorer()
            division, portions = self.divided(poses, scorer, named, may_be_none=not alone)
            of_own = _groups_of(groups, division.count, all_here=alone)
            whole = _rule_of(rule, of_own if alone else None)
            request = self._request(whole, schedule, skip_below, division, named.values())
            tracked = chain(named.values(), whole.parameters())
            hooked = choose(request) != "retain" and any(map(has_hooks, tracked))
            return Call(
                scorer,
                portions,
                division,
                request,
                of_own,
                named,
                self._parts(),
                hooked,
                self._apart,
            )

        return own() if ranks is None else _together(ranks, own)

    def plan(
        self,
        poses: Any,
        rule: Rule,
        groups: Tensor | Sequence[int] | None,
        schedule: str,
        skip_below: float,
        parameters: Iterable[Tensor],
    ) -> Plan:
        """What such a call would do, for poses that have a length."""
        self._how_scored()
        count_to_plan(poses, _count_of(poses, as_batch(poses)))
        division = self._division(poses, self._named().values())
        whole = _rule_of(rule, _groups_of(groups, division.count, all_here=self._ranks is None))
        return describe(
            self._request(whole, schedule, skip_below, division, parameters, uses_up=True)
        )

    def scorer(self) -> Scorer:
        """How poses are scored.

        Raises:
            ValueError: if they must pass through several modules, and nobody said how.
        """
        return Scorer(self._modules, self._how_scored(), self._collate)

    def divided(
        self,
        poses: Iterable[Pose],
        scorer: Scorer,
        named: Mapping[str, nn.Parameter],
        *,
        may_be_none: bool = False,
    ) -> tuple[Division, Callable[..., Iterator[Portion]]]:
        """How poses are divided, and the function that divides them, as `Division.portions`.

        Args:
            poses: As users state them.
            scorer: Runs the model.
            named: The model's parameters.
            may_be_none: Whether other ranks may have poses where this one has none.

        Raises:
            NoPosesError: if there are none.
            ValueError: if they must be joined, and nobody said how.
        """
        division = self._division(poses, named.values())
        if division.is_empty and not may_be_none:
            raise NoPosesError(
                "There are no poses: a combination of none is undefined.\n"
                "Leave compounds without poses out of the loop. A generator that was used once is "
                "empty: make a list of it."
            )

        def portions(
            *, light: bool = False, whole: bool = False, reserved: float = 0.0
        ) -> Iterator[Portion]:
            chunks = division.portions(light=light, whole=whole, reserved=reserved)
            looked = (torch.is_grad_enabled(), False) in division.known.apart
            settled = division.walked or (looked and isinstance(division, Sliced))
            if division.is_stated or self._is_sharded() or settled:
                return chunks
            return self._apart.shown(chunks, division.known, scorer)

        return division, portions

    def _division(self, poses: Iterable[Pose], parameters: Iterable[Tensor]) -> Division:
        batch, size = as_batch(poses), self._chunk_size
        if batch is not None:
            known = self._meter.of(self._kind(batch.poses, "slice", parameters))
            return Sliced(batch, size, known, measures=not self._is_sharded())
        joins = self._collate is not None or size not in _ALONE
        ahead = Ahead(poses)
        known = self._meter.of(self._kind(ahead.first, "joined" if joins else "alone", parameters))
        return Walked(ahead, size, known, joins=joins)

    def _kind(self, pose: Pose, how: str, parameters: Iterable[Tensor]) -> Hashable:
        """What poses have in common whose graphs are alike but for their size."""
        kinds = tuple([(t.dtype, t.ndim, t.requires_grad) for t in tensors_of(pose)])
        parts = tuple([part.training for part in self._parts()])
        trained = tuple([p.requires_grad for p in parameters])
        return type(pose), how, kinds, parts, trained, torch.is_autocast_enabled("cpu")

    def _tensors(self) -> Iterator[Tensor]:
        return (t for m in self._modules for t in chain(m.parameters(), m.buffers()))

    def _is_sharded(self) -> bool:
        return self._ranks is not None and self._ranks.sharded

    def _how_scored(self) -> Callable[..., Any]:
        """What the modules and a pose are handed to."""
        if self._predict is None and len(self._modules) > 1:
            raise ValueError(
                f"The engine has {len(self._modules)} modules and cannot know how a pose passes "
                f"through them.\nPass Engine(..., predict=lambda first, second, pose: ...). "
                f"Outputs that you hand to jacobian() or backward() need none."
            )
        return self._predict or nn.Module.__call__

    def _request(
        self,
        rule: Combination,
        schedule: str,
        skip_below: float,
        division: Division,
        parameters: Iterable[Tensor],
        *,
        uses_up: bool = False,
    ) -> Request:
        """What the choice of a schedule looks at; `uses_up` as for `work_of`."""
        counting = {} if division.is_stated else division.known.counting
        request = Request(
            rule,
            schedule,
            skip_below,
            one_chunk=division.one_chunk,
            scales_float16=False,
            shared=self._ranks is not None,
            sharded=self._is_sharded(),
            measured=division.is_measured and not self._is_sharded(),
            work=partial(work_of, division, parameters, uses_up=uses_up),
            known=counting.get(name_of(rule)) if counting else None,
        )
        if choose(request) == "retain":  # plain autograd, whatever the model does
            return request
        return request.told(scales_float16=scales_float16(self._parts()))


_ALONE = (1, "auto")  # chunk sizes under which poses that are walked come one by one


def _together(ranks: Ranks, make: Callable[[], Call]) -> Call:
    """The call that all ranks make; `make` makes this rank's, with the rule for one group."""
    calls: list[Call] = []

    def told() -> tuple[int, dict[str, object], Groups | None, bool]:
        call = make()
        calls.append(call)
        outline = call.request.outline() | {
            "chosen schedule": choose(call.request),
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
    call = call.told(ranks=ranks.in_call(numbers), has_hooks=any(hooked))
    if call.groups is None:
        return call
    joined = Groups.joined(groups)
    return call.told(
        request=call.request.told(rule=Grouped(call.request.rule, joined)),
        groups=replace(call.groups, count=joined.count),
    )


def _weights(request: Request) -> str:
    """How the rule's weights separate: running sums of ranks add up only if they do alike."""
    form = request.form
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


def _count_of(poses: object, batch: Batch | None) -> int | None:
    """The number of poses, as far as they say."""
    if batch is not None:
        return batch.count
    return len(poses) if isinstance(poses, Sized) else None


def _groups_of(
    groups: Tensor | Sequence[int] | None, count: int | None, *, all_here: bool = True
) -> Groups | None:
    """The groups of one call.

    Args:
        groups: As users state them.
        count: The number of poses, if it is known.
        all_here: Whether each must have a pose here; it may have some on other ranks.

    Raises:
        NoPosesError: if a group is empty.
        ShapeMismatchError: if there are more or fewer poses than the groups have.
    """
    if groups is None:
        return None
    owners = Groups.of(groups) if all_here else Groups.some_of(groups)
    if count is not None:
        owners.check(count)
    return owners


def _rule_of(rule: Rule, groups: Groups | None) -> Combination:
    """The rule of one call: for several groups, applied to each.

    Raises:
        TypeError: if it is no rule of predictions.
    """
    rule = rule_of_predictions(rule)
    return rule if groups is None else Grouped(rule, groups)
