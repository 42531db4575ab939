"""What one call asks for: poses, rule and schedule; the same on all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, final

from torch import Tensor, nn

from posegrad._torch import has_hooks
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Groups, PerGroup
from posegrad.errors import RankError, listed
from posegrad.jacobian._record import record
from posegrad.model import check_no_talk
from posegrad.ranks import Ranks
from posegrad.schedule._batch import Batch, as_batch
from posegrad.schedule._division import Division
from posegrad.schedule._options import Options
from posegrad.schedule._plan import Plan, Request, choose, count_to_plan, describe
from posegrad.schedule._poses import Pose
from posegrad.schedule._replay import scales_float16
from posegrad.schedule._work import name_of, work_of
from posegrad.weighting._rules import rule_of_predictions

__all__ = ["Call", "call_of", "plan_of"]


@final
@record
class Call:
    """One call of `Engine.combine`, as far as it is settled before any pose is scored.

    Args:
        options: How the engine runs poses.
        division: The poses of this rank, in chunks.
        request: What the choice of a schedule depends on; its rule covers all groups.
        groups: The groups of this rank's poses, if there are several.
        named: The models' parameters.
        has_hooks: Whether a parameter of the models or the rule has hooks, on any rank. Then all
            poses are scored with graphs: only these tell whether plain autograd would run the
            hooks.
        ranks: The ranks that make this call together, if the group is shared.
    """

    options: Options
    division: Division
    request: Request
    groups: Groups | None
    named: Mapping[str, nn.Parameter]
    has_hooks: bool
    ranks: Ranks | None = None

    def told(self, **more: Any) -> "Call":
        """A copy with some fields replaced."""
        return Call(**vars(self) | more)


def call_of(
    options: Options,
    poses: Iterable[Pose] | Tensor,
    rule: Rule,
    groups: Tensor | Sequence[int] | None = None,
    schedule: str = "auto",
    skip_below: float = 0.0,
) -> Call:
    """What one call of `Engine.combine` asks for; the arguments are the same.

    Raises:
        RankError: if ranks ask for different things.
        NoPosesError: if there are no poses, or a group is empty.
        ShapeMismatchError, TypeError, ValueError: as `Engine.combine`.
    """
    ranks, alone = options.ranks, options.ranks is None

    def own() -> Call:
        named = options.roster.named()
        if ranks is not None:
            check_no_talk(options.modules, sharded=ranks.sharded)
        options.scorer()  # raises if there is none
        division = options.division(poses, named.values(), may_be_empty=not alone)
        of_own = _groups_of(groups, division.count, all_here=alone)
        whole = _rule_of(rule, of_own if alone else None)
        request = _request(options, whole, schedule, skip_below, division, named.values())
        tracked = chain(named.values(), whole.parameters())
        hooked = choose(request) != "retain" and any(map(has_hooks, tracked))
        return Call(options, division, request, of_own, named, hooked)

    return own() if ranks is None else _together(ranks, own)


def plan_of(
    options: Options,
    poses: Any,
    rule: Rule,
    groups: Tensor | Sequence[int] | None,
    schedule: str,
    skip_below: float,
    parameters: Iterable[Tensor],
) -> Plan:
    """What such a call would do, for poses that have a length."""
    options.scorer()
    count_to_plan(poses, _count_of(poses, as_batch(poses)))
    division = options.division(poses, options.roster.named().values(), may_be_empty=True)
    whole = _rule_of(rule, _groups_of(groups, division.count, all_here=options.ranks is None))
    return describe(
        _request(options, whole, schedule, skip_below, division, parameters, uses_up=True)
    )


def _request(
    options: Options,
    rule: Combination,
    schedule: str,
    skip_below: float,
    division: Division,
    parameters: Iterable[Tensor],
    *,
    uses_up: bool = False,
) -> Request:
    """What the choice of a schedule depends on; `uses_up` as for `work_of`."""
    counting = {} if division.is_stated else division.known.counting
    request = Request(
        rule,
        schedule,
        skip_below,
        one_chunk=division.one_chunk,
        scales_float16=False,
        shared=options.ranks is not None,
        sharded=options.is_sharded,
        measured=division.is_measured and not options.is_sharded,
        work=partial(work_of, division, parameters, uses_up=uses_up),
        known=counting.get(name_of(rule)) if counting else None,
    )
    # `retain` is plain autograd, whatever the model does.
    if choose(request) != "retain" and scales_float16(options.roster.parts()):
        return request.told(scales_float16=True)
    return request


def _together(ranks: Ranks, make: Callable[[], Call]) -> Call:
    """The call of all ranks; `make` makes this rank's, with the rule for one group."""
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
        request=call.request.told(rule=PerGroup(call.request.rule, joined)),
        groups=replace(call.groups, count=joined.count),
    )


def _weights(request: Request) -> str:
    """How the rule's weights separate: running sums of ranks only add up if all do it alike."""
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
    """The number of poses, if they tell."""
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
        all_here: Whether each must have a pose on this rank; otherwise other ranks may have them.

    Raises:
        NoPosesError: if a group is empty.
        ShapeMismatchError: if the number of poses is not that of the groups.
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
    return rule if groups is None else PerGroup(rule, groups)
