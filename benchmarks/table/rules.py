"""The table of the suite `rules`: a line for each rule, a column for each network."""

from typing import Any

from benchmarks.table.lines import line, machine, median_ms, ratio, rule

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    """Time beside a plain step, and error, of each rule."""
    cases = [case["case"] for case in result["cases"]]
    found = {(row["case"], row["rule"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["rule"] for row in result["rows"]))
    lines = [line([_named(name), *_cells(found, name, cases)]) for name in names]
    head = line(["rule", *cases, "largest gradient error"])
    return "\n".join([_heading(result), "", head, rule(len(cases) + 2), *lines, ""])


def _heading(result: dict[str, Any]) -> str:
    return (
        f"A training step with each rule. {machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to a plain step, forward and backward of the "
        f"summed output, within a round: median of {result['rounds']} rounds (least to most). "
        "`Clip` cuts at the median norm. Errors against the same rule on rows by autograd in "
        "float64."
    )


def _named(name: str) -> str:
    return name if name == "plain" else f"`{name}`"


def _cells(found: dict[tuple[str, str], Any], name: str, cases: list[str]) -> list[str]:
    rows = [found.get((case, name), {}) for case in cases]
    units = [found[case, "plain"]["seconds"] for case in cases]
    times = [
        median_ms(unit) if name == "plain" else ratio(row["seconds"], unit) if row else ""
        for row, unit in zip(rows, units, strict=True)
    ]
    errors = [row["gradient_error"] for row in rows if "gradient_error" in row]
    return [*times, f"{max(errors):.0e}" if errors else ""]
