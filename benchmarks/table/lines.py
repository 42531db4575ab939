"""What the tables of all suites are made of."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "Row",
    "absent",
    "line",
    "machine",
    "median_ms",
    "ratio",
    "relative",
    "rounds",
    "rule",
    "values",
]

Row = dict[str, Any]


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rule(columns: int) -> str:
    """The line under a table's head."""
    return line(["---"] * columns)


def ratio(seconds: Sequence[float], plain: Sequence[float]) -> str:
    """Median of the ratios within each round, and their range."""
    ratios = _ratios(seconds, plain)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def relative(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(_ratios(seconds, plain))


def _ratios(seconds: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [s / p for s, p in zip(seconds, plain, strict=True)]


def rounds(rows: Iterable[Row]) -> str:
    """How many there were; short cases have more."""
    counts = sorted({len(row["seconds"]) for row in rows if "seconds" in row})
    return f"{counts[0]} to {counts[-1]} rounds" if len(counts) > 1 else f"{counts[0]} rounds"


def median_ms(seconds: Sequence[float]) -> str:
    """The unit of ratios in itself."""
    return f"1 ({statistics.median(seconds) * 1000:.3g} ms)"


def values(rows: Iterable[Row], key: str, form: str) -> list[str] | None:
    """One figure of each row, empty where it has none; None where none has."""
    found = [row.get(key) for row in rows]
    if all(value is None for value in found):
        return None
    return ["" if value is None else form.format(value) for value in found]


def absent(result: dict[str, Any]) -> str:
    """The peers that were not installed, one line for each."""
    return "".join(
        f"Without {package}, which is not installed: `{command}`.\n"
        for package, command in result["missing"].items()
    )


def machine(result: dict[str, Any]) -> str:
    """Where a suite ran, in one sentence."""
    environment = result["environment"]
    packages = environment["packages"].items()
    versions = ", ".join(f"{name} {version}" for name, version in packages if version is not None)
    allocator = environment["allocator"]
    settings = ", ".join(f"{k}={v}" for k, v in allocator["settings"].items()) or "default"
    peaks = "its allocator's peaks: live is what it handed out, resident what it reserved"
    gpu = f"{environment['gpu']} ({peaks}), " if environment["gpu"] else ""
    return (
        f"{gpu}{environment['processor']}, {environment['threads']} thread(s), denormals "
        f"{'flushed' if environment['flush_denormal'] else 'not flushed'}, {allocator['libc']} "
        f"malloc ({settings}), Python {environment['python']}, {versions}, {environment['date']}."
    )
