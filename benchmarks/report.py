"""`python -m benchmarks.report`: what is made of the results, and of nothing else.

The page docs/benchmarks.md with all tables, the tables of other pages, and the plots.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.plots import PLOTS, draw
from benchmarks.table import SUITES, markdown
from benchmarks.table import losses as lost
from benchmarks.table.lines import Row, line, relative, rule

__all__ = ["MARKS", "TABLES", "load", "main", "page"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("<!-- made by `python -m benchmarks.report` -->\n", "<!-- until here -->")

Results = Mapping[str, dict[str, Any]]


def load() -> dict[str, dict[str, Any]]:
    """The committed results, by suite; those of a GPU under names that say so."""
    paths = {suite: RESULTS / f"{suite}-cpu.json" for suite in SUITES}
    paths |= {f"{suite} on a GPU": RESULTS / f"{suite}-cuda.json" for suite in SUITES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def page(results: Results) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks\n\n"
        "`make bench` writes this page from the JSON files in `benchmarks/results`, which hold the "
        "seconds of every round. [Performance](performance.md) sums them up and tells how they are "
        "measured. Where errors are shown, the result of a method was compared with float64 in the "
        "same run.\n"
    ]
    for suite, result in results.items():
        behind = lost.markdown(result)
        plot = f"![The suite {suite}](figures/{suite}.png)\n\n" if suite in PLOTS else ""
        parts.append(f"## {suite}\n\n{plot}{markdown(result)}" + (f"\n{behind}" if behind else ""))
    return "\n".join(parts)


def _first_screen(results: Results) -> str:
    """The README's table: one row for each kind of user."""
    poses = [
        row
        for row in results["multipose"]["rows"]
        if (row["model"], row["poses"], row["rule"]) == ("SchNet", 64, "Min(1000)")
    ]
    head = ["one step, one CPU thread", "plain autograd", "best peer", "posegrad"]
    lines = [
        _line("smooth minimum of 64 docked poses, SchNet", poses, "posegrad auto"),
        _line(
            "clipped gradient of each text, Llama, next word", _ordinary(results, "llama", "clip")
        ),
        _line(
            "Gramian of the gradients of 64 images' losses, MLP, cross entropy",
            _ordinary(results, "mlp", "gramian"),
        ),
    ]
    return "\n".join([line(head), rule(len(head)), *map(line, lines)]) + "\n"


def _ordinary(results: Results, case: str, task: str) -> list[Row]:
    rows = [row for row in results["ordinary"]["rows"] if row["case"] == case]
    return [row for row in rows if row["task"] in ("plain", task)]


def _line(name: str, rows: list[Row], ours: str = "posegrad") -> list[str]:
    timed = [row for row in rows if "seconds" in row]
    plain = next(row for row in timed if row["method"] == "plain")
    own = next(row for row in timed if row["method"] == ours)
    peers = [row for row in timed if row is not plain and not row["method"].startswith("posegrad")]
    best = min(peers, key=lambda row: relative(row["seconds"], plain["seconds"]))
    seconds = statistics.median(plain["seconds"])
    unit = f"1 ({seconds:.2f} s)" if seconds >= 0.1 else f"1 ({seconds * 1000:.1f} ms)"
    theirs = f"{_figure(best, plain)} ({best['method']})"
    return [name, unit + _peak(plain), theirs, f"**{_figure(own, plain)}**"]


def _steps(results: Results) -> str:
    """What a step of each kind costs, for the page of performance."""
    lines = [line(["a step", "time", "peak memory", "of plain autograd", "suite"]), rule(5)]
    for text, suite, chosen in _STEPS:
        rows = [row for row in results[suite]["rows"] if _is_chosen(row, chosen)]
        timed = {row["method"]: row for row in rows if "seconds" in row}
        plain, own = timed["plain"], timed.get("posegrad auto") or timed["posegrad"]
        time = f"{relative(own['seconds'], plain['seconds']):.2f}"
        link = f"[{suite}](benchmarks.md#{suite})"
        lines.append(line([text, time, _mib(own), _mib(plain), link]))
    return "\n".join(lines) + "\n"


def _is_chosen(row: Row, chosen: Row) -> bool:
    """Whether it is of this case and task; a plain step is the unit of every task."""
    return all(row.get(name) in (value, "plain") for name, value in chosen.items())


def _mib(row: Row) -> str:
    found = row.get("second_live_mib", row.get("live_mib"))
    return "" if found is None else f"{found:.0f} MiB"


_DOCKED = {"model": "SchNet", "poses": 64}
_STEPS: list[tuple[str, str, Row]] = [
    ("sharp minimum of 64 docked poses, SchNet", "multipose", _DOCKED | {"rule": "Min(1000)"}),
    ("mean of 64 docked poses, SchNet", "multipose", _DOCKED | {"rule": "Mean"}),
    ("attention pooling of 1000 patches", "bags", {"case": "gated attention"}),
    ("contrastive loss of 512 pairs", "bags", {"case": "contrast"}),
    ("clipped gradients, MLP, 64 poses", "clipping", {"case": "mlp-64"}),
    ("clipped gradients, convolutions, 32 images", "clipping", {"case": "conv-32"}),
    ("clipped gradients, encoder, 16 sequences", "clipping", {"case": "encoder-16"}),
    ("clipped gradients, BERT, cross entropy", "ordinary", {"case": "bert", "task": "clip"}),
    ("Gramian and weighted gradient, MLP, 64 poses", "gramian", {"case": "mlp-64"}),
    ("Gramian and weighted gradient, encoder, 16 sequences", "gramian", {"case": "encoder-16"}),
    ("Gramian and weighted gradient, SchNet, 16 docked poses", "gramian", {"case": "schnet-16"}),
]
"""What a step does, its suite, and which of the suite's rows are its."""


def _figure(row: Row, plain: Row) -> str:
    return f"{relative(row['seconds'], plain['seconds']):.2f}{_peak(row)}"


def _peak(row: Row) -> str:
    return f", {row['live_mib']:.0f} MiB" if "live_mib" in row else ""


def _clipping(results: Results) -> str:
    """Ratios and memory of each case of the suite `clipping`."""
    result, rows = results["clipping"], results["clipping"]["rows"]
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "plain"]
    lines = [line(["case", *methods]), rule(1 + len(methods))]
    for case in result["cases"]:
        found = {row["method"]: row for row in rows if row["case"] == case["case"]}
        cells = (
            f"{_ratio(found, method)}, {found[method]['second_live_mib']:.1f} MiB"
            for method in methods
        )
        lines.append(line([case["text"], *cells]))
    return "\n".join(lines) + "\n"


def _gramian(results: Results) -> str:
    """Ratios of the suite `gramian`: of the better of TorchJD's engines, and of the others."""
    peers = ["TorchJD", "vmap(grad)", "rows by autograd.grad"]
    lines = [line(["model", "posegrad", *peers]), rule(2 + len(peers))]
    texts = {case["case"]: case for case in results["gramian"]["cases"]}
    for case in ("mlp-64", "conv-32", "encoder-16", "large-8", "schnet-16"):
        rows = [row for row in results["gramian"]["rows"] if row["case"] == case]
        found = {row["method"]: row for row in rows if "seconds" in row}
        cells = []
        for name in ("posegrad", *peers):
            ratios = [_ratio(found, method) for method in found if method.startswith(name)]
            cells.append(min(ratios, key=float, default=""))
        lines.append(line([f"{texts[case]['text']}, m = {texts[case]['poses']}", *cells]))
    return "\n".join(lines) + "\n"


def _ratio(rows: Mapping[str, Row], method: str) -> str:
    return f"{relative(rows[method]['seconds'], rows['plain']['seconds']):.2f}"


TABLES: dict[str, Callable[[Results], str]] = {
    "README.md": _first_screen,
    "docs/coming-from-opacus.md": _clipping,
    "docs/jacobian.md": _gramian,
    "docs/performance.md": _steps,
}
"""Pages with a table of their own, between `MARKS`."""


def main() -> None:
    """Write the page, the tables of other pages and the plots."""
    results = load()
    (ROOT / "docs" / "benchmarks.md").write_text(page(results), encoding="utf-8")
    start, end = MARKS
    for name, table in TABLES.items():
        path = ROOT / name
        before, rest = path.read_text(encoding="utf-8").split(start)
        after = rest.split(end)[1]
        path.write_text(before + start + table(results) + end + after, encoding="utf-8")
    draw(results, ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
