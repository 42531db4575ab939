"""Which schedule runs, and what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from posegrad.combination import Combination, OnlineForm
from posegrad.combination._groups import groups_of, ungrouped
from posegrad.errors import NoPosesError, UnsupportedModuleError
from posegrad.graph import Outlook
from posegrad.jacobian import Backwards
from posegrad.jacobian._record import record
from posegrad.jacobian._table import Line, size, table
from posegrad.ranks import shown
from posegrad.schedule._cost import Cost, Load, cheapest, costs
from posegrad.weighting._rules import AnyRule, as_gradient_rule, is_of_predictions

__all__ = [
    "SCHEDULES",
    "Plan",
    "ReadingPlan",
    "Request",
    "choose",
    "count_to_plan",
    "describe",
    "may_be_output",
    "reading_plan",
    "underflow",
]

SCHEDULES = ("auto", *(cost.schedule for cost in costs(Load())))


@final
@record
class Request:
    """What the choice of a schedule depends on; `shared` means that other ranks have poses too.

    `sharded` means that FSDP2 has spread the parameters over them. `known` is how many poses
    carried weight in the last call, and of how many; `measured`, whether graphs were measured;
    `work`, what there is to do under any rule.
    """

    rule: Combination
    schedule: str
    skip_below: float
    one_chunk: bool
    scales_float16: bool
    components: int = 1
    rule_is_trained: bool = False
    shared: bool = False
    sharded: bool = False
    measured: bool = False
    work: Callable[[], Load] = Load
    known: tuple[int, int] | None = None

    @cached_property
    def form(self) -> OnlineForm | None:
        """The rule's online form, or None while the rule itself is trained."""
        if self.rule_is_trained or any(p.requires_grad for p in self.rule.parameters()):
            return None
        return self.rule.online()

    def counting(self, poses: int) -> tuple[int, str]:
        """How many of some poses carry weight, as far as can be told beforehand, and the source."""
        groups = groups_of(self.rule)
        declared = ungrouped(self.rule).counting()
        if declared is not None:
            return min(poses, declared * (1 if groups is None else groups.count)), "by the rule"
        if self.known is not None:
            counted, of = self.known
            return (poses if counted == of else min(poses, counted)), "in the last call"
        form = self.form
        if form is not None and not form.soft:
            return min(poses, 1 if groups is None else groups.count), "as the rule is sharp"
        return poses, "until a call has shown"

    def few_count(self) -> bool:
        """Whether some poses are known to carry no weight."""
        if ungrouped(self.rule).counting() is not None:
            return True
        if self.known is not None:
            return self.known[0] < self.known[1]
        return self.form is not None and not self.form.soft

    @cached_property
    def load(self) -> Load:
        """What there is to do."""
        form, groups = self.form, groups_of(self.rule)
        work = self.work()
        work.counting = self.counting(work.poses)[0]
        work.sums = form.count if form is not None and form.soft else 0
        work.components = self.components
        work.groups = 1 if groups is None else groups.count
        work.early = not self.scales_float16
        return work

    @cached_property
    def choice(self) -> str:
        """What `choose` returns."""
        return _chosen(self)

    def told(self, **more: Any) -> "Request":
        """A copy with some fields replaced."""
        return Request(**{name: getattr(self, name) for name in _FIELDS} | more)

    def outline(self) -> dict[str, object]:
        """What ranks that share a group must agree on, by the name users know."""
        return {
            "rule": shown(self.rule),
            "schedule": self.schedule,
            "skip_below": self.skip_below,
            "float16": self.scales_float16,
            "no_grad": not torch.is_grad_enabled(),
        }


_FIELDS = tuple(Request.__annotations__)


def choose(request: Request) -> str:
    """The name of the schedule to run.

    Raises:
        ValueError: if the requested schedule does not exist or cannot serve the call.
    """
    return request.choice


def _chosen(request: Request) -> str:
    if request.schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={request.schedule!r} is unknown; it is one of {', '.join(SCHEDULES)}."
        )
    if not 0 <= request.skip_below < 1:
        raise ValueError(f"skip_below is {request.skip_below}, but it must lie in [0, 1).")
    if request.schedule == "auto":
        return _automatic(request)[0]
    _check_served(request)
    return request.schedule


def underflow(who: str) -> str:
    """Why a schedule that differentiates early refuses float16."""
    return (
        f"{who} differentiates before the loss is scaled, and float16 gradients would underflow "
        f"without a word. Use schedule='recompute' or 'auto', or autocast to bfloat16."
    )


def _automatic(request: Request) -> tuple[str, str]:
    """The name of the schedule, and why; without a reason where numbers decided."""
    if request.skip_below > 0:
        return "recompute", "skip_below leaves out poses once all weights are known"
    if request.sharded:
        return "recompute", "the parameters are sharded"
    measured = request.measured
    if request.one_chunk and not request.shared and not (measured and request.few_count()):
        return "retain", _ONE_CHUNK  # nothing else takes less
    if measured and not request.shared:
        return cheapest(request.load).schedule, ""
    return _unmeasured(request)


def _unmeasured(request: Request) -> tuple[str, str]:
    """The choice for several chunks whose graphs were not measured."""
    if request.scales_float16:
        return "recompute", "float16 gradients need the scaled loss first"
    form = request.form
    if form is None:
        return "recompute", "the rule's weights do not separate"
    if not form.soft:
        return "recompute", "the rule is sharp: most poses get weight zero"
    if request.components != 1:
        return "recompute", "the predictions are vectors"
    if groups_of(request.rule) is not None:
        return "recompute", "several groups would need running sums each"
    if form.count > 1 and not request.shared and request.load.together > 1:
        return "recompute", "each running sum would take a backward of every chunk"
    return "stream", "the rule's weights separate"


_ONE_CHUNK = "all poses fit into one chunk, so there is one graph anyway"


def _why(request: Request) -> str:
    """Why this schedule runs."""
    if request.schedule != "auto":
        return "asked for"
    chosen, reason = _automatic(request)
    if reason:
        return reason
    load = request.load
    counting, source = request.counting(load.poses)
    if chosen == "recompute" and counting < load.poses:
        return f"{counting} of {load.poses} poses count, {source}"
    return {
        "retain": _ONE_CHUNK,
        "store": "the rows of all poses fit, and none is scored twice",
        "stream": "the rule's weights separate",
        "recompute": "the rule's weights do not separate, and the rows of all poses do not fit",
    }[chosen]


def _check_served(request: Request) -> None:
    name = request.schedule
    if request.sharded and name != "recompute":
        raise UnsupportedModuleError(
            f"schedule={name!r} takes the gradients of poses one by one, and parameters sharded by "
            f"fully_shard get none but from backward(). Use schedule='recompute' or 'auto'."
        )
    if name == "retain" and request.shared:
        raise ValueError(
            "schedule='retain' is plain autograd, whose gradients would stay on each rank. Use "
            "'recompute', 'stream', 'store' or 'auto' for a group that is shared."
        )
    if request.skip_below > 0 and name != "recompute":
        raise ValueError(
            f"skip_below={request.skip_below} needs all weights before any pose is "
            f"differentiated, which schedule={name!r} does not have; use 'recompute' or 'auto'."
        )
    if name == "stream" and request.form is None:
        raise ValueError(
            f"{type(ungrouped(request.rule)).__name__} cannot stream: its weights do not separate, "
            f"it has parameters to train, or it returns more than the combined prediction. Use "
            f"schedule='recompute' or 'auto'."
        )
    if name in ("stream", "store") and request.scales_float16:
        raise ValueError(underflow(f"schedule={name!r}"))


@final
@dataclass(frozen=True)
class Plan:
    """What one `combine` would do. Prints as a table.

    Args:
        schedule: The schedule that would run; `reason` says why.
        poses: m; `chunks`: the number of forwards that score them.
        counting: How many poses carry weight, as far as can be told beforehand, and the source.
        forwards: Forwards in all; a range where it depends on the weights.
        backwards: The same for backwards.
        graphs: How many chunks' graphs are alive at once.
        holds: What else is kept between combine and backward.
        bytes_held: The size of that for scalar predictions; None under `retain`, which keeps graphs
            alone.
        costs: Of each schedule the time, in forwards of a pose, and the bytes it keeps.

    Example:
        >>> plan = Engine(nn.Linear(3, 1)).plan(list(torch.zeros(64, 3)), Min(scale=1000.0))
        >>> plan.schedule, plan.backwards, plan.bytes_held
        ('recompute', '1 to 64', 256)
    """

    schedule: str
    reason: str
    poses: int
    chunks: int
    counting: str
    forwards: str
    backwards: str
    graphs: int
    holds: str
    bytes_held: int | None
    costs: tuple[Cost, ...]

    def __str__(self) -> str:
        held = "" if self.bytes_held is None else f": {size(self.bytes_held)}"
        rows = {
            "schedule": f"{self.schedule} ({self.reason})",
            "poses": f"{self.poses} in {self.chunks} chunk" + "s" * (self.chunks != 1),
            "forwards": self.forwards,
            "backwards": self.backwards,
            "graphs": f"{self.graphs} at a time",
            "holds": f"{self.holds}{held}",
            "count": self.counting,
        }
        lines = [f"{name:<10} {text}" for name, text in rows.items()]
        plain = next(cost.time for cost in self.costs if cost.schedule == "retain")
        beside = [
            Line(cost.schedule, (f"{cost.time / plain:.2f}", _kept(cost), self._said(cost)))
            for cost in self.costs
        ]
        return "\n".join([*lines, "", table(("", "time", "keeps", ""), beside)])

    def _said(self, cost: Cost) -> str:
        if cost.schedule == self.schedule:
            return "chosen"
        return "" if cost.fits or cost.bytes is None else "does not fit"


def _kept(cost: Cost) -> str:
    """What a schedule keeps; graphs are counted until they are measured."""
    if cost.bytes is not None:
        return size(int(cost.bytes))
    graphs = f"{cost.graphs} graph" + "s" * (cost.graphs != 1)
    return f"{size(int(cost.held))} + {graphs}" if cost.held else graphs


@final
@dataclass(frozen=True)
class ReadingPlan:
    """How the Jacobian of an output would be read. Prints as a table.

    Args:
        rows: The number of its rows.
        paths: For each parameter, how the rows of each use are read, unless poses turn out to mix.
        backwards: How many backwards a call takes, and why if more than one.
        remarks: When a call takes more.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> print(Engine(model).plan(model(torch.ones(4, 3)), Clip(1.0)))
        4 rows, 1 backward to the activations; more in a first call, which compares
        parameter  uses  path
        weight     1     closed form (Addmm)
        bias       1     closed form (Addmm)
    """

    rows: int
    paths: Mapping[str, tuple[str, ...]]
    backwards: Backwards
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            Line(name, (str(len(paths)), " + ".join(dict.fromkeys(paths)) or "unused"))
            for name, paths in self.paths.items()
        ]
        first = "; ".join([f"{self.rows} rows, {self.backwards}", *self.remarks])
        return "\n".join([first, table(("parameter", "uses", "path"), lines)])


def may_be_output(tensor: object, rule: object) -> bool:
    """Whether a tensor could be an output to which the rule is applied, not poses.

    Poses computed by a part of the model carry its graph too. A rule of predictions needs an output
    with one number a row.
    """
    if not isinstance(tensor, Tensor):
        return False
    alone = tensor.ndim == 0 or tensor.numel() == len(tensor)
    return alone or not is_of_predictions(rule)


def reading_plan(
    output: Any,
    outlook: Outlook,
    rule: Tensor | AnyRule,
    groups: object,
    schedule: str,
    skip_below: float,
) -> ReadingPlan:
    """How the Jacobian of an output would be read for a rule.

    Raises:
        TypeError: if it is no rule.
        ValueError: if options are given that only poses have.
    """
    as_gradient_rule(rule)
    if groups is not None or schedule != "auto" or skip_below:
        raise ValueError(
            f"The tensor of shape {list(output.shape)} was computed from the engine's parameters, "
            f"so it is an output for backward(), which has no groups, schedule or skip_below.\n"
            f"Leave these out; or pass list(poses), if its rows are poses."
        )
    remarks = [] if outlook.is_known else ["more in a first call, which compares"]
    remarks += [f"{output.numel()} more where poses mix"] if outlook.may_mix else []
    return ReadingPlan(output.numel(), outlook.paths, outlook.backwards, tuple(remarks))


def count_to_plan(poses: object, count: int | None) -> int:
    """The number of poses.

    Raises:
        TypeError: if the poses have no length.
        NoPosesError: if there are none.
    """
    if count is None:
        raise TypeError(
            f"plan() needs to know how many poses there are, and a {type(poses).__name__} does "
            f"not say. Pass a list or a batch."
        )
    if count == 0:
        raise NoPosesError("There are no poses to plan for.")
    return count


def describe(request: Request) -> Plan:
    """The plan of one combine, for scalar predictions."""
    load = request.load
    poses, chunks, groups = load.poses, load.chunks, groups_of(request.rule)
    schedule, reason = choose(request), _why(request)
    chunks = 1 if schedule == "retain" and load.whole else chunks
    form, scored = request.form, poses if load.walked else chunks
    sums = (form.count if form is not None else 1) * (1 if groups is None else groups.count)
    passes = chunks if poses == chunks else chunks * sums
    gradient = load.gradient
    texts: dict[str, tuple[str, str, int, str, int | None]] = {
        "retain": (f"{scored}", "1, through all graphs", chunks, "nothing beside the graphs", None),
        "store": (f"{scored}", f"{poses}", 1, f"{poses} gradients", poses * gradient),
        "stream": (
            f"{scored}",
            f"1 to {passes}",
            1,
            f"{sums} running sum" + "s" * (sums > 1),
            sums * gradient,
        ),
        "recompute": (
            f"{scored}, then 1 to {scored}",
            f"1 to {chunks}",
            1,
            "the predictions, beside the poses",
            4 * poses,
        ),
    }
    counting, source = request.counting(poses)
    who = f"{counting} ({source})"
    if schedule == "recompute":
        who += ", scored again " + ("by themselves" if load.picks else "with their chunks")
    return Plan(schedule, reason, poses, chunks, who, *texts[schedule], tuple(costs(load)))
