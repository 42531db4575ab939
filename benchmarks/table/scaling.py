"""The tables of the suite `scaling`, one for each sweep."""

import statistics
from typing import Any

from benchmarks.table.lines import Row, line, machine, rule, values

__all__ = ["markdown"]

SWEEPS = {
    "poses": "Against the number of poses: MLP 128-1024-512-1",
    "parameters": "Against the number of parameters: 4 poses",
}


def markdown(result: dict[str, Any]) -> str:
    """Time and memory of each case and method."""
    tables = "\n\n".join(_table(result, sweep) for sweep in SWEEPS)
    return f"{_heading(result)}\n\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"One training step on light poses. {machine(result)}\n"
        f"Time ({result['clock']} clock): median of {result['rounds']} rounds. Memory: a process "
        "of its own with default malloc settings, beyond network and poses."
    )


def _table(result: dict[str, Any], sweep: str) -> str:
    rows = [row for row in result["rows"] if row["sweep"] == sweep]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"**{SWEEPS[sweep]}**", "", line(["case", "", *methods]), rule(len(methods) + 2)]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [row for row in rows if row["case"] == case]
        lines.append(line([case, "seconds", *(_seconds(row) for row in found)]))
        for key, label, form in (
            ("live_mib", "peak live MiB", "{:.1f}"),
            ("resident_mib", "peak resident MiB", "{:.0f}"),
            ("gradient_error", "gradient error", "{:.0e}"),
        ):
            cells = values(found, key, form)
            if cells is not None:
                lines.append(line(["", label, *cells]))
    return "\n".join(lines)


def _seconds(row: Row) -> str:
    return f"{statistics.median(row['seconds']):.3g}" if "seconds" in row else f"({row['unfit']})"
