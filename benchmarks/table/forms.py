"""The table of the suite `forms`, a line for each layer."""

from typing import Any

from benchmarks.table.lines import Row, line, machine, median_ms, ratio, rule

__all__ = ["markdown"]

HEAD = ("layer", "inputs", "rows by", "limit", "posegrad", "Gramian error", "gradient error")


def markdown(result: dict[str, Any]) -> str:
    """Time beside the limit, and errors, of each layer."""
    layers = list(dict.fromkeys(row["layer"] for row in result["rows"]))
    found = {(row["layer"], row["method"]): row for row in result["rows"]}
    lines = [_line(found[name, "plain"], found[name, "posegrad"]) for name in layers]
    return "\n".join([_heading(result), "", line(HEAD), rule(len(HEAD)), *lines, ""])


def _heading(result: dict[str, Any]) -> str:
    return (
        "One layer alone: forward, Jacobian, Gramian and weighted gradient. "
        f"{machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to the layer's own forward and backward to "
        f"its parameters within a round, the limit: median of {result['rounds']} rounds (least to "
        "most). Errors against rows by autograd in float64."
    )


def _line(plain: Row, posegrad: Row) -> str:
    inputs = ", ".join("x".join(map(str, shape)) for shape in plain["inputs"])
    forms = " + ".join(dict.fromkeys(form for path in plain["forms"].values() for form in path))
    times = median_ms(plain["seconds"]), ratio(posegrad["seconds"], plain["seconds"])
    errors = (f"{posegrad[key]:.0e}" for key in ("gramian_error", "gradient_error"))
    return line([plain["layer"], inputs, forms, *times, *errors])
