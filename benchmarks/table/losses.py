"""Where posegrad does not win, each with a sentence why."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.table.lines import Row, line, relative, rule

__all__ = ["UNKNOWN", "Loss", "losses", "markdown", "why"]

UNKNOWN = "not known; `WHY` has no sentence for it"

MARGIN = 1.05  # what is closer is a tie on a shared machine


class Loss(NamedTuple):
    """A peer that does better on a case, as far as a figure goes.

    Args:
        place: Task, case, peer and figure, as a path.
        share: The peer's figure over posegrad's: time within a round (median), or live bytes.
    """

    place: str
    share: float


_AFTER = (
    "the peer forms rows within the backward, while cotangents are in the cache; here they are "
    "formed after it, of what was held"
)
_ALIVE = "operands and cotangents are held at once, for whatever is asked of the Jacobian next"
_KEPT = "the rows that were made for the norms are kept for the weighted sum"
_NOT_KEPT = (
    "no rows are formed, for a quarter of the memory; so the weighted gradient is a product of its "
    "own"
)
_ALL_LIVE = (
    "every pose has a weight, so all are differentiated, as by plain autograd; on top come the "
    "walk that looks for untracked tensors and the running sums"
)
_FEW = "with few poses to leave out, the replay of the others is not repaid"
_ONE_CHUNK = "all poses are one chunk, so this is plain autograd; on top comes the cost of a call"
_CHUNKS = "one batch makes fewer and larger products of matrices than chunks of a hundred poses"
_GRAPH = "the graph of a chunk of a hundred poses is held; one by one, that of one pose is"
_SUMS = "beside the graph of a chunk, its gradient and the running sum are held"
_TWICE = "every chunk is scored twice, where plain autograd keeps the graphs of all"
_LOOKS = "every graph is walked in search of untracked tensors, and every replay is compared"

_FORWARD = (
    "forward mode takes two forwards, holds nothing, and leaves nothing behind: another product "
    "takes all of it again, and an operator without a forward rule is an error"
)

CPU = {
    "J @ v/*/torch.func.jvp/*": _FORWARD,
    "projection/*/memory": _ALIVE,
    "J @ K.T/*/memory": "rows that were made for this product are kept for the next one",
    "clipping/encoder-*/memory": _KEPT,
    "gramian/large-*/time": _NOT_KEPT,
    "gramian/*/memory": _ALIVE,
    "clipping/*/memory": _ALIVE,
    "rows/*/memory": _ALIVE,
    "matrix/*/memory": _ALIVE,
    "rows/*/time": _AFTER,
    "matrix/*/time": _AFTER,
    "Mean/*/time": _ALL_LIVE,
    "Boltzmann(kT)/*/time": _ALL_LIVE,
    "Min(1/kT)/*/time": _ALL_LIVE,
    "Min(1000)/*/time": _FEW,
    "10 poses, */time": _ONE_CHUNK,
    "100 poses, */time": _ONE_CHUNK,
    "*parameters, */time": _ONE_CHUNK,
    "gated attention/plain/time": _TWICE,
    "contrast/plain/time": _TWICE,
    "*/two passes by hand/time": _LOOKS,
    "TopK(8)/the best again by hand/*": _LOOKS,
    "*, poses/*/time": _CHUNKS,
    "*, poses/*/memory": _GRAPH,
    "*/memory": _SUMS,
}

WHY: dict[str, dict[str, str]] = {"cpu": CPU, "cuda": {}}
"""Sentences by device and place; the first that fits is taken. No GPU has been measured yet."""


def losses(result: dict[str, Any]) -> list[Loss]:
    """The figures in which a peer is ahead by more than a tie.

    Of memory the exact bytes of a step after the first.
    """
    return [loss for loss in _contests(result) if loss.share * MARGIN < 1]


def markdown(result: dict[str, Any]) -> str:
    """A table of them with the reasons; empty if there are none."""
    found = losses(result)
    if not found:
        return ""
    device = result["device"]
    lines = [line([f"`{loss.place}`", f"{loss.share:.2f}", why(loss, device)]) for loss in found]
    head = line(["where a peer is ahead", "its share of posegrad's", "why"])
    return "\n".join([head, rule(3), *lines, ""])


def why(loss: Loss, device: str) -> str:
    """The reason for one, or `UNKNOWN`."""
    fitting = (text for place, text in WHY[device].items() if fnmatchcase(loss.place, place))
    return next(fitting, UNKNOWN)


def _contests(result: dict[str, Any]) -> Iterator[Loss]:
    """Every figure of a peer beside posegrad's."""
    for place, rows, ours, memory in _cases(result):
        own = next((row for row in rows if row["method"] == ours), None)
        for row in rows:
            if own is None or row is own or row["method"].startswith("posegrad"):
                continue
            for figure, key in (("time", "seconds"), ("memory", memory)):
                if row.get(key) is not None and own.get(key) is not None:
                    share = _share(row[key], own[key])
                    yield Loss(f"{place}/{row['method']}/{figure}", share)


def _cases(result: dict[str, Any]) -> Iterator[tuple[str, list[Row], str, str]]:
    """Place, rows to compare, posegrad's method, and the name of the memory figure."""
    suite, groups = result["suite"], {}
    for row in result["rows"]:
        if suite in ("multipose", "docked"):
            place = f"{row['rule']}/{row['model']}, {row['poses']} poses"
            how = ("posegrad auto", "live_mib")
        elif suite == "scaling":
            place = f"{row['case']}, {row['sweep']}"
            how = (
                next(m["method"] for m in result["rows"] if "a chunk" in m["method"]),
                "live_mib",
            )
        elif suite == "bags":
            place, how = row["case"], ("posegrad", "live_mib")
        elif suite in ("gramian", "rows", "clipping") and row["task"] != "plain":
            place, how = f"{row['task']}/{row['case']}", ("posegrad", "second_live_mib")
        elif suite == "operator" and row["method"] != "plain":
            place, how = f"{row['task']}/{row['case']}", ("posegrad", "live_mib")
        else:
            continue
        groups.setdefault((place, *how), []).append(row)
    for (place, ours, memory), rows in groups.items():
        yield place, rows, ours, memory


def _share(theirs: float | list[float], ours: float | list[float]) -> float:
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return theirs / ours  # type: ignore[operator]
    return relative(theirs, ours)
