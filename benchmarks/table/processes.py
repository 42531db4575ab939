"""The table of the suite `processes`."""

from typing import Any

from benchmarks.table.lines import line, machine, ratio, rule

__all__ = ["markdown"]

ALONE = "one process"


def markdown(result: dict[str, Any]) -> str:
    """The time of a step on several processes, beside that of one of them alone."""
    rows = {(row["rule"], row["method"]): row for row in result["rows"]}
    lines = []
    for (name, method), row in rows.items():
        if method != ALONE:
            alone = rows[name, ALONE]
            unit = f"1 ({min(alone['seconds']):.2f} s)"
            shares = " + ".join(map(str, row["shares"]))
            shown = [name, shares, unit, ratio(row["seconds"], alone["seconds"])]
            lines.append(line([*shown, f"{row['gradient_error']:.0e}"]))
    head = line(["rule", "poses of each", ALONE, "together", "gradient error"])
    return "\n".join([_heading(result), "", head, rule(5), *lines, ""])


def _heading(result: dict[str, Any]) -> str:
    return (
        "One group of docked poses on several processes of one thread each, PyG SchNet, "
        f"`Engine(model, process_group=...)`. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to one process alone within a round: median "
        f"of {result['rounds']} rounds (least to most). Errors against autograd in float64."
    )
