"""The tables of the suite `multipose`, one for each model and number of poses."""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.table.lines import Row, line, machine, ratio, rounds, rule, values

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    """Time, memory and gradient error of each rule and method."""
    cases = dict.fromkeys((row["model"], row["poses"]) for row in result["rows"])
    tables = "\n\n".join(_table(result, *case) for case in cases)
    return f"{_heading(result)}\n\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"Distinct docked poses, one training step. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to plain autograd within a round: median of "
        f"{rounds(result['rows'])} (least to most). The limit is a forward for each pose and a "
        "backward for each pose of nonzero weight. Gradient error: largest over parameters of "
        "‖g − g64‖ / ‖g64‖, against autograd in float64."
    )


def _table(result: dict[str, Any], model: str, m: int) -> str:
    rows = [row for row in result["rows"] if (row["model"], row["poses"]) == (model, m)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"**{result['models'][model]}: {m} poses**", ""]
    lines.append(line(["rule", "", *methods, "forwards alone", "limit"]))
    lines.append(rule(len(methods) + 4))
    for limit in result["limits"]:
        if (limit["model"], limit["poses"]) == (model, m):
            cases = [row for row in rows if row["rule"] == limit["rule"]]
            lines += _rule_lines(cases, limit)
    return "\n".join(lines)


def _rule_lines(cases: list[Row], limit: Row) -> list[str]:
    plain = next(row["seconds"] for row in cases if row["method"] == "plain")
    name = f"{limit['rule']}, {limit['backwards_needed']} backwards needed"
    times = [ratio(seconds, plain) for seconds in _seconds(cases, limit)]
    times[0] = f"1 ({statistics.median(plain):.2f} s)"
    lines = [line([name, "time", *times])]
    for key, label, form in (
        ("live_mib", "peak live MiB", "{:.1f}"),
        ("resident_mib", "peak resident MiB", "{:.0f}"),
        ("gradient_error", "gradient error", "{:.0e}"),
    ):
        cells = values(cases, key, form)
        if cells is not None:
            lines.append(line(["", label, *cells, "", ""]))
    return lines


def _seconds(cases: list[Row], limit: Row) -> Iterable[list[float]]:
    yield from (row["seconds"] for row in cases)
    yield limit["forwards_seconds"]
    yield limit["limit_seconds"]
