"""The tables of the suites on one batch, one for each task."""

from typing import Any

from benchmarks.table.lines import (
    Row,
    absent,
    line,
    machine,
    median_ms,
    ratio,
    rounds,
    rule,
    values,
)

__all__ = ["markdown"]

PLAIN = "plain"
FIGURES = (
    ("first_live_mib", "peak live MiB, first call", "{:.1f}"),
    ("second_live_mib", "peak live MiB, second call", "{:.1f}"),
    ("resident_mib", "peak resident MiB, first call", "{:.0f}"),
    ("gramian_error", "Gramian error", "{:.0e}"),
    ("gradient_error", "gradient error", "{:.0e}"),
    ("rows_error", "rows error", "{:.0e}"),
)


def markdown(result: dict[str, Any]) -> str:
    """Time, memory and errors of each case and method."""
    tables = "\n\n".join(_table(result, task) for task in result["tasks"])
    return f"{_heading(result)}\n{absent(result)}\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"Gradients of single poses in one batch. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to plain forward and backward within a "
        f"round: median of {rounds(result['rows'])} (least to most). Memory: a process of its own "
        "with default malloc settings, beyond network and inputs; the first call includes making "
        "the engine and its checks, or hooks. Errors: ‖G − G64‖ / ‖G64‖, and the largest over "
        "parameters of ‖g − g64‖ / ‖g64‖, against rows by autograd in float64."
    )


def _table(result: dict[str, Any], task: str) -> str:
    rows = [row for row in result["rows"] if row["task"] in (PLAIN, task)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [
        f"**{result['tasks'][task]}**",
        "",
        line(["case", "", *methods]),
        rule(len(methods) + 2),
    ]
    for case in result["cases"]:
        found = {row["method"]: row for row in rows if row["case"] == case["case"]}
        lines += _case_lines(case, [found.get(method, {}) for method in methods])
    return "\n".join(lines)


def _case_lines(case: Row, rows: list[Row]) -> list[str]:
    plain = next(row["seconds"] for row in rows if row.get("method") == PLAIN)
    name = f"{case['case']}: {case['text']}, m = {case['poses']}"
    lines = [line([name, "time", *(_time(row, plain) for row in rows)])]
    for key, label, form in FIGURES:
        cells = values(rows, key, form)
        if cells is not None:
            lines.append(line(["", label, *cells]))
    return lines


def _time(row: Row, plain: list[float]) -> str:
    if "seconds" not in row:
        return f"({row['unfit']})" if "unfit" in row else ""
    return median_ms(plain) if row["method"] == PLAIN else ratio(row["seconds"], plain)
