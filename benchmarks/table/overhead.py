"""The table of the suite `overhead`."""

from typing import Any

from benchmarks.table.lines import line, machine, median_ms, ratio, rule

__all__ = ["markdown"]

ALONE = "alone"


def markdown(result: dict[str, Any]) -> str:
    """The time of a plain step, beside that of a network which no library follows."""
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    libraries = list(dict.fromkeys(row["library"] for row in result["rows"]))
    found = {(row["network"], row["library"]): row["seconds"] for row in result["rows"]}
    lines = []
    for network in networks:
        unit = found[network, ALONE]
        others = (ratio(found[network, name], unit) for name in libraries if name != ALONE)
        lines.append(line([network, median_ms(unit), *others]))
    head = line(["network", *libraries])
    return "\n".join([_heading(result), "", head, rule(len(libraries) + 1), *lines, ""])


def _heading(result: dict[str, Any]) -> str:
    return (
        "A plain training step of a network that a library follows, which the step does not use. "
        f"{machine(result)}\n"
        f"Time ({result['clock']} clock) is the ratio to the network alone within a round: median "
        f"of {result['rounds']} rounds (least to most). Opacus computes all rows meanwhile; "
        "its attention is made of linear layers."
    )
