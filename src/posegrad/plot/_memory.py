"""What each schedule would hold."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from posegrad.errors import NoPosesError
from posegrad.jacobian._table import size
from posegrad.plot._axes import FOR, INK, QUIET, axes_of, plain
from posegrad.schedule._plan import Plan

__all__ = ["memory"]


def memory(plans: Plan | Sequence[Plan], *, ax: Axes | None = None) -> Axes:
    """A bar for what each plan keeps between `combine` and `backward`, beside its graphs and work.

    The size of a graph is the model's and unknown before a forward. So no bar includes graphs: they
    are counted in the text beside it, with the forwards and backwards.

    Args:
        plans: Of `Engine.plan`, one for each schedule to compare.
        ax: Where to draw; default: a new figure.

    Returns:
        The axes; widths are bytes.

    Raises:
        NoPosesError: if there are no plans.
        TypeError: if one is none of `combine`.

    Example:
        >>> engine = Engine(nn.Linear(255, 1))
        >>> poses = list(torch.zeros(64, 255))
        >>> schedules = ("retain", "store", "stream", "recompute")
        >>> ax = plot.memory([engine.plan(poses, Mean(), schedule=name) for name in schedules])
        >>> [int(bar.get_width()) for bar in ax.patches]
        [0, 65536, 1024, 256]
    """
    plans = _checked(plans)
    ax = axes_of(ax, size=(7.6, 0.7 + 0.55 * len(plans)))
    places = range(len(plans))
    held = [float(plan.bytes_held or 0) for plan in plans]
    ax.barh(places, held, height=0.5, color=FOR)
    for place, plan, width in zip(places, plans, held, strict=True):
        ax.annotate(
            _said(plan), (width, place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9, color=INK,
        )  # fmt: skip
    largest = max([*held, 1.0])
    ax.set_yticks(places, labels=[plan.schedule for plan in plans])
    ax.set_ylim(len(plans) - 0.5, -0.5)  # the first on top
    ax.set_xlim(0, 2.7 * largest)  # room for the words
    ax.set_xticks([0, largest], labels=["0", size(largest)])
    plain(ax)
    ax.spines["bottom"].set_bounds(0, largest)
    ax.spines["bottom"].set_color(QUIET)
    ax.set_title("kept for backward, beside graphs", color=INK, loc="left")
    return ax


def _said(plan: Plan) -> str:
    kept = "" if plan.bytes_held is None else f"{size(plan.bytes_held)} + "
    graphs = f"{plan.graphs} graph" + "s" * (plan.graphs != 1)
    return f"{kept}{graphs};  forwards {plan.forwards};  backwards {plan.backwards}"


def _checked(plans: Plan | Sequence[Plan]) -> Sequence[Plan]:
    plans = list(plans) if isinstance(plans, Sequence) else [plans]
    if not plans:
        raise NoPosesError("There are no plans to draw.\nPass engine.plan(poses, rule).")
    other = next((plan for plan in plans if not isinstance(plan, Plan)), None)
    if other is not None:
        raise TypeError(
            f"A plan is a {type(other).__name__}; the picture shows what combine() would hold.\n"
            f"Pass engine.plan(poses, rule) of poses, not of an output with a graph."
        )
    return plans
