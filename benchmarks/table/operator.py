"""The tables of the suite `operator`, one for each task."""

from typing import Any

from benchmarks.table.lines import Row, line, machine, median_ms, ratio, rounds, rule, values

__all__ = ["markdown"]

PLAIN = "plain"
FIGURES = (("live_mib", "peak live MiB", "{:.1f}"), ("error", "error", "{:.0e}"))


def markdown(result: dict[str, Any]) -> str:
    """Time, memory and errors of each case and method."""
    tables = "\n\n".join(_table(result, task) for task in result["tasks"])
    return f"{_heading(result)}\n\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"The Jacobian as a linear operator. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to plain forward and backward of one batch "
        f"within a round: median of {rounds(result['rows'])} (least to most). Memory: the tensors "
        "that a call after the first makes. Errors: relative, against rows by autograd in float64. "
        "`vmap(grad)` forms all rows by torch.func first. Peers project by random numbers of their "
        "own, so there are no errors to tell."
    )


def _table(result: dict[str, Any], task: str) -> str:
    rows = [row for row in result["rows"] if row["task"] == task]
    methods = list(dict.fromkeys([PLAIN, *(row["method"] for row in rows)]))
    head = [f"**{result['tasks'][task]}**", "", line(["case", "", *methods])]
    lines = [*head, rule(len(methods) + 2)]
    for case in result["cases"]:
        found = {row["method"]: row for row in rows if row["case"] == case["case"]}
        if found:
            lines += _of_case(case, [found.get(method, {}) for method in methods])
    return "\n".join(lines)


def _of_case(case: Row, rows: list[Row]) -> list[str]:
    unit = rows[0]["seconds"]
    lines = [line([f"{case['case']}: {case['text']}", "time", *(_time(r, unit) for r in rows)])]
    for key, label, form in FIGURES:
        cells = values(rows, key, form)
        if cells is not None:
            lines.append(line(["", label, *cells]))
    return lines


def _time(row: Row, unit: list[float]) -> str:
    if "seconds" not in row:
        return f"({row['unfit']})" if "unfit" in row else ""
    return median_ms(unit) if row["method"] == PLAIN else ratio(row["seconds"], unit)
