"""The picture: accuracy against what it costs in privacy, and what a step costs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window

import matplotlib.pyplot as plt

from examples.private.cost import Cost
from examples.private.training import Epoch

__all__ = ["draw"]

COLOURS = {
    "posegrad": "#0B6E99",
    "Opacus, flat": "#D9480F",
    "Opacus, ghost": "#F59F00",
    "not private": "#5C6670",
}
LINES = {"posegrad": "-", "Opacus, flat": "--", "Opacus, ghost": ":"}


def draw(trained: dict[str, list[Epoch]], costs: dict[str, Cost], path: Path) -> None:
    """Writes a PNG.

    Args:
        trained: The epochs of each way.
        costs: What a step of each way costs.
        path: Where to; its folder is made.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=[2, 1, 1]
    )
    for name, line in LINES.items():
        epsilons, scores = zip(*((e.epsilon, e.accuracy) for e in trained[name]), strict=True)
        left.plot(epsilons, scores, line, color=COLOURS[name], label=name, lw=2)
    last = trained["not private"][-1].accuracy
    left.axhline(last, color=COLOURS["not private"], lw=1, label="not private")
    left.set(xlabel="ε spent", ylabel="accuracy, held out", title="Same σ, same images, same ε")
    left.legend(loc="lower right", frameon=False)
    bars = {
        middle: ("time of a step, of plain", [cost.of_plain for cost in costs.values()]),
        right: ("peak of a step, MiB", [cost.peak_mib for cost in costs.values()]),
    }
    for axis, (title, values) in bars.items():
        drawn = axis.bar(list(costs), values, color=[COLOURS[name] for name in costs])
        axis.bar_label(drawn, fmt="%.2g" if axis is middle else "%.0f")
        axis.set_title(title)
        axis.tick_params("x", rotation=30)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
