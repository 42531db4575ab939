"""The tables of the suite `bags`, one for each case."""

import statistics
from typing import Any

from benchmarks.table.lines import line, machine, ratio, relative, rounds, rule, values

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    """Time, memory and gradient error of each way."""
    tables = "\n\n".join(_table(result, case) for case in result["cases"])
    return f"{_heading(result)}\n\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"A training step on a bag of patches, and on pairs. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to plain autograd, and to the same done "
        f"by hand, within a round: median of {rounds(result['rows'])} (least to most). All score "
        "the same chunks. Gradient error: largest over parameters of ‖g − g64‖ / ‖g64‖, against "
        "autograd in float64 under the same random masks; from plain: likewise, against plain "
        "autograd in float32."
    )


def _table(result: dict[str, Any], case: str) -> str:
    rows = [row for row in result["rows"] if row["case"] == case]
    plain = rows[0]["seconds"]
    by_hand = next(row["seconds"] for row in rows if row["method"].endswith("by hand"))
    columns = [
        [row["method"] for row in rows],
        [f"1 ({statistics.median(plain):.2f} s)", *(ratio(r["seconds"], plain) for r in rows[1:])],
        [f"{relative(row['seconds'], by_hand):.2f}" for row in rows],
        values(rows, "live_mib", "{:.1f}"),
        values(rows, "resident_mib", "{:.0f}"),
        values(rows, "gradient_error", "{:.0e}"),
        values(rows, "from_plain", "{:.0e}"),
    ]
    names = ["way", "time", "of by hand", "peak live MiB", "peak resident MiB"]
    names += ["gradient error", "from plain"]
    present = [(name, cells) for name, cells in zip(names, columns, strict=True) if cells]
    head = line(name for name, _ in present)
    lines = map(line, zip(*(cells for _, cells in present), strict=True))
    title = f"**{result['cases'][case]}, chunks of {result['chunk_sizes'][case]}**"
    return "\n".join([title, "", head, rule(len(present)), *lines])
