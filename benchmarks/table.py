"""Markdown tables from a suite's JSON: `python -m benchmarks.table benchmarks/results/….json`."""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["markdown"]

Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """All tables of a multipose result, one for each number of poses, with its environment."""
    sizes = sorted({row["poses"] for row in result["rows"]})
    tables = "\n\n".join(_table(result, m) for m in sizes)
    return f"{_heading(result)}\n\n{tables}\n"


def _heading(result: dict[str, Any]) -> str:
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    allocator = where["allocator"]
    settings = ", ".join(f"{k}={v}" for k, v in allocator["settings"].items()) or "default"
    return (
        f"{result['model']}, distinct docked poses, one training step. {where['processor']}, "
        f"{where['threads']} thread(s), denormals "
        f"{'flushed' if where['flush_denormal'] else 'not flushed'}, {allocator['libc']} malloc "
        f"({settings}), Python {where['python']}, {versions}, {where['date']}.\n"
        f"Time ({result['clock']} clock) is the ratio to plain autograd within a round: median of "
        f"{result['rounds']} rounds (least to most). The limit is a forward for each pose and a "
        "backward for each pose of nonzero weight. Gradient error: largest over parameters of "
        "‖g − g64‖ / ‖g64‖, against autograd in float64."
    )


def _table(result: dict[str, Any], m: int) -> str:
    rows = [row for row in result["rows"] if row["poses"] == m]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"**{m} poses**", "", _line(["rule", "", *methods, "forwards alone", "limit"])]
    lines.append(_line(["---"] * (len(methods) + 4)))
    for limit in (limit for limit in result["limits"] if limit["poses"] == m):
        cases = [row for row in rows if row["rule"] == limit["rule"]]
        lines += _rule_lines(cases, limit)
    return "\n".join(lines)


def _rule_lines(cases: list[Row], limit: Row) -> list[str]:
    plain = next(row["seconds"] for row in cases if row["method"] == "plain")
    name = f"{limit['rule']}, {limit['backwards_needed']} backwards needed"
    times = [_ratio(seconds, plain) for seconds in _seconds(cases, limit)]
    times[0] = f"1 ({statistics.median(plain):.2f} s)"
    lines = [_line([name, "time", *times])]
    for key, label, form in (
        ("live_mib", "peak live MiB", "{:.1f}"),
        ("resident_mib", "peak resident MiB", "{:.0f}"),
        ("gradient_error", "gradient error", "{:.0e}"),
    ):
        values = [row.get(key) for row in cases]
        if any(value is not None for value in values):
            cells = ["" if value is None else form.format(value) for value in values]
            lines.append(_line(["", label, *cells, "", ""]))
    return lines


def _seconds(cases: list[Row], limit: Row) -> Iterable[list[float]]:
    yield from (row["seconds"] for row in cases)
    yield limit["forwards_seconds"]
    yield limit["limit_seconds"]


def _ratio(seconds: list[float], plain: list[float]) -> str:
    ratios = [s / p for s, p in zip(seconds, plain, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
