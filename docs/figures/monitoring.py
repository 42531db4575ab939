"""Draws the figure of docs/monitoring.md from what its code computes.

Run `python -m docs.figures.monitoring` from the root of the repository, with
`pip install -e '.[test,plot]'`.
"""

from typing import Any

from matplotlib.figure import Figure

from docs.figures.page import run, save

LOSS, NOISE = "#9aa5b1", "#1b7837"


def _draw(name: str, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    losses = figure.subplots()
    scales = losses.twinx()
    loss, scale = zip(*found["course"], strict=True)
    losses.plot(loss, color=LOSS, linewidth=0.9)
    losses.set_xlabel("step")
    losses.set_ylabel("loss of a batch", color=LOSS)
    scales.plot(range(10, len(scale)), scale[10:], color=NOISE)
    scales.axhline(found["m"], color="0.6", linestyle=":")
    scales.text(len(scale), found["m"], "batch ", ha="right", va="bottom", color="0.4")
    scales.set_yscale("log")
    scales.set_ylabel("noise scale, poses", color=NOISE)
    for ax in (losses, scales):
        ax.spines["top"].set_visible(False)
    save(figure, name)


if __name__ == "__main__":
    run("monitoring.md", _draw)
