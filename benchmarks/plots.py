"""Plots of the results, from the JSON files alone."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.table.lines import Row, relative

__all__ = ["PLOTS", "draw"]

PLOTS = ("multipose", "gramian", "scaling")
"""The suites that have one."""

OURS, THEIRS = "#1b7837", "#9aa5b1"


def draw(results: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Write `multipose.png`, `gramian.png` and `scaling.png`.

    Raises:
        ModuleNotFoundError: naming the line that installs matplotlib.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        error.add_note("The plots need matplotlib: pip install 'matplotlib>=3.9'")
        raise
    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    for name, figure in (
        ("multipose", _multipose(results["multipose"])),
        ("gramian", _gramian(results["gramian"])),
        ("scaling", _scaling(results["scaling"])),
    ):
        figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})


def _figure(columns: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _multipose(result: dict[str, Any]) -> Any:
    figure, axes = _figure(2, 3.2)
    rows = [row for row in result["rows"] if (row["model"], row["poses"]) == ("SchNet", 64)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for k, rule in enumerate(("Min(1000)", "Mean")):
        found = {row["method"]: row for row in rows if row["rule"] == rule}
        plain = found["plain"]["seconds"]
        places = [place + 0.4 * k for place in range(len(methods))]
        times = [relative(found[m]["seconds"], plain) for m in methods]
        memories = [found[m]["live_mib"] for m in methods]
        for axis, values in zip(axes, (times, memories), strict=True):
            axis.barh(places, values, 0.38, color=_colours(methods), alpha=1 - 0.4 * k)
    for axis, text in zip(axes, ("time / plain autograd", "peak live MiB"), strict=True):
        axis.set_yticks([place + 0.2 for place in range(len(methods))], methods)
        axis.invert_yaxis()
        axis.set_xlabel(text)
    axes[1].set_xscale("log")
    axes[1].set_xlim(left=1)
    figure.suptitle("64 docked poses, SchNet: smooth minimum (dark) and mean (light)")
    return figure


def _gramian(result: dict[str, Any]) -> Any:
    cases = ("mlp-64", "conv-32", "encoder-16", "schnet-16")
    figure, axes = _figure(len(cases), 2.8)
    for axis, case in zip(axes, cases, strict=True):
        rows = [row for row in result["rows"] if row["case"] == case and "seconds" in row]
        plain = next(row["seconds"] for row in rows if row["method"] == "plain")
        shown = [row for row in rows if row["method"] != "plain"]
        names = [row["method"] for row in shown]
        axis.barh(
            names,
            [relative(row["seconds"], plain) for row in shown],
            color=_colours(names),
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(left=0.5)
        axis.set_title(case)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle("Forward, Gramian, weighted gradient: time / plain forward and backward")
    return figure


def _scaling(result: dict[str, Any]) -> Any:
    figure, axes = _figure(2, 3.2)
    rows = [r for r in result["rows"] if r["sweep"] == "poses" and r["rule"] == "Mean"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and "seconds" in row]
        style = {"color": OURS} if method.startswith("posegrad") else {"color": THEIRS}
        line = {"marker": "o", "markersize": 3, "linestyle": _STYLES.get(method, "-"), **style}
        sizes = [row["poses"] for row in own]
        axes[0].plot(sizes, [statistics.median(r["seconds"]) for r in own], label=method, **line)
        axes[1].plot(*_measured(own), label=method, **line)
    for axis, text in zip(axes, ("seconds", "peak live MiB"), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("poses")
        axis.set_ylabel(text)
    axes[1].legend(fontsize=6)
    figure.suptitle("The mean of light poses, MLP 128-1024-512-1")
    return figure


_STYLES = {"plain, one batch": "--", "checkpoint": ":", "two passes": "-.", "posegrad": ":"}


def _measured(rows: Iterable[Row]) -> tuple[list[int], list[float]]:
    found = [(row["poses"], row["live_mib"]) for row in rows if row.get("live_mib") is not None]
    return [poses for poses, _ in found], [mib for _, mib in found]


def _colours(methods: Iterable[str]) -> list[str]:
    return [OURS if method.startswith("posegrad") else THEIRS for method in methods]
