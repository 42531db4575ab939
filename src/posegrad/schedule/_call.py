"""What a call asks for: how an engine runs poses, the poses, the rule, the caller's wishes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn

from posegrad._torch import has_hooks
from posegrad.combination import Combination
from posegrad.combination._base import Rule
from posegrad.combination._groups import Grouped, Groups
from posegrad.errors import NoPosesError, RankError, listed
from posegrad.graph import check_no_talk
from posegrad.ranks import Ranks
from posegrad.schedule._apart import Apart
from posegrad.schedule._batch import Batch, as_batch
from posegrad.schedule._chunks import ChunkSize, Portion, checked, in_portions, sizes_of, sliced
from posegrad.schedule._plan import Plan, Request, choose, chunks_in, count_to_plan, describe
from posegrad.schedule._poses import Pose
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
        parts: All modules of the model.
        has_hooks: Whether a parameter of the model or the rule has some, on any rank. All poses are
            scored with graphs then: only these tell whether plain autograd would run them.
        ranks: Who make this call together, if the group is shared.
    """

    scorer: Scorer
    chunks: Iterator[Portion]
    request: Request
    groups: Groups | None
    named: Mapping[str, nn.Parameter]
    parts: Sequence[nn.Module]
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
        parts: Lists all modules inside, once that was asked.

    Raises:
        ValueError: if `chunk_size` is none.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        predict: Callable[..., Tensor] | None,
        collate: Callable[[list[Pose]], Any] | None,
        chunk_size: ChunkSize,
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
        self._apart = Apart(modules, named, parts)

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
            scorer, batch = self.scorer(), as_batch(poses)
            several, chunks = self.chunks(poses, batch, scorer, may_be_none=not alone)
            of_own = _groups_of(groups, _count_of(poses, batch), all_here=alone)
            whole = _rule_of(rule, of_own if alone else None)
            request = self._request(whole, schedule, skip_below, one_chunk=not several)
            tracked = chain(named.values(), whole.parameters())
            hooked = choose(request)[0] != "retain" and any(map(has_hooks, tracked))
            return Call(scorer, chunks, request, of_own, named, self._parts(), hooked)

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
        batch = as_batch(poses)
        count = count_to_plan(poses, _count_of(poses, batch))
        chunks = chunks_in(poses, batch, count, self._chunk_size)
        whole = _rule_of(rule, _groups_of(groups, count, all_here=self._ranks is None))
        request = self._request(whole, schedule, skip_below, one_chunk=chunks == 1)
        return describe(request, count, chunks, parameters)

    def scorer(self) -> Scorer:
        """How poses are scored.

        Raises:
            ValueError: if they must pass through several modules, and nobody said how.
        """
        return Scorer(self._modules, self._how_scored(), self._collate)

    def chunks(
        self,
        poses: Iterable[Pose],
        batch: Batch | None,
        scorer: Scorer,
        *,
        may_be_none: bool = False,
    ) -> tuple[bool, Iterator[Portion]]:
        """Whether there are several chunks, and these.

        Args:
            poses: As users state them.
            batch: What `as_batch` makes of them.
            scorer: Runs the model.
            may_be_none: Whether other ranks may have poses where this one has none.

        Raises:
            NoPosesError: if there are none.
            ValueError: if they must be joined, and nobody said how.
        """
        size = self._chunk_size
        chunks: Iterator[Portion]
        if batch is None:
            walked = in_portions(poses, size, joins=self._collate is not None or size not in _ALONE)
            opening = list(islice(walked, 2))
            count, chunks = len(opening), chain(opening, walked)
        else:
            sizes = sizes_of(batch, size)
            count, chunks = len(sizes), sliced(batch, sizes)
            if size == "auto" and not self._is_sharded():
                chunks = self._apart.shown(chunks, sizes, batch, scorer)
        if not count and not may_be_none:
            raise NoPosesError(
                "There are no poses: a combination of none is undefined.\n"
                "Leave compounds without poses out of the loop. A generator that was used once is "
                "empty: make a list of it."
            )
        return count > 1, chunks

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
        self, rule: Combination, schedule: str, skip_below: float, *, one_chunk: bool
    ) -> Request:
        request = Request(
            rule,
            schedule,
            skip_below,
            one_chunk=one_chunk,
            scales_float16=False,
            shared=self._ranks is not None,
            sharded=self._is_sharded(),
        )
        if choose(request)[0] == "retain":  # plain autograd, whatever the model does
            return request
        return replace(request, scales_float16=scales_float16(self._parts()))


_ALONE = (1, "auto")  # chunk sizes under which poses that are walked come one by one


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
