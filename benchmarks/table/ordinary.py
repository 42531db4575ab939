"""The tables of the suite `ordinary`: one for each task, and how posegrad reads each network."""

from typing import Any

from benchmarks.table.lines import Row, absent, line, machine, median_ms, relative, rounds, rule

__all__ = ["markdown"]

PLAIN = "plain"


def markdown(result: dict[str, Any]) -> str:
    """Time and errors of each case and way."""
    tables = "\n\n".join(_table(result, task) for task in result["tasks"])
    return f"{_heading(result)}\n{absent(result)}\n{tables}\n\n{_readings(result)}\n"


def _heading(result: dict[str, Any]) -> str:
    return (
        f"Losses and networks as people write them, random weights. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to a plain step, forward and backward of the "
        f"summed losses, within a round: median of {rounds(result['rows'])}. A way that raises has "
        "its error instead. In brackets the error where it is above 1e-4: of norms, Gramian or "
        "gradient, against rows by autograd in float64; in float32 where the forward is random or "
        "has an operator without float64."
    )


def _table(result: dict[str, Any], task: str) -> str:
    rows = [row for row in result["rows"] if row["task"] in (PLAIN, task)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    head = line(["case", *methods])
    lines = [f"**{result['tasks'][task]}**", "", head, rule(len(methods) + 1)]
    for case in result["cases"]:
        found = {row["method"]: row for row in rows if row["case"] == case["case"]}
        unit = found[PLAIN]["seconds"]
        name = f"{case['case']}: {case['text']}, m = {case['poses']}"
        lines.append(line([name, *(_cell(found.get(method, {}), unit) for method in methods)]))
    return "\n".join(lines)


def _cell(row: Row, unit: list[float]) -> str:
    if "seconds" not in row:
        return f"({row['unfit']})".replace("|", "/") if "unfit" in row else ""
    if row["method"] == PLAIN:
        return median_ms(unit)
    wrong = max((value for key, value in row.items() if key.endswith("_error")), default=0.0)
    note = f" ({wrong:.0e})" if not wrong <= 1e-4 else ""  # nan is shown
    return f"{relative(row['seconds'], unit):.2f}{note}"


def _readings(result: dict[str, Any]) -> str:
    lines = [
        "**How posegrad reads them, from the third call on**",
        "",
        line(["case", "backwards", "parameters without a closed form", "warnings"]),
        rule(4),
    ]
    for case in result["cases"]:
        ways = "; ".join(f"{count} by {path}" for path, count in case["open"].items())
        cells = (case["case"], str(case["backwards"]), ways, "; ".join(case["warnings"]))
        lines.append(line(cell.replace("|", "/") for cell in cells))
    return "\n".join(lines)
