"""Draws the figure of docs/influence.md from what its code computes.

Run `python -m docs.figures.influence` from the root of the repository, with
`pip install -e '.[plot]'`.
"""

from typing import Any

import torch
from matplotlib.figure import Figure

from docs.figures.page import run, save

COLOURS = ("#1b7837", "#9aa5b1", "#d6604d")


def _draw(name: str, found: dict[str, Any]) -> None:
    is_wrong = found["is_wrong"].float()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    count = 2 * int(is_wrong.sum())
    for (method, suspicion), colour in zip(found["suspicions"].items(), COLOURS, strict=True):
        hits = is_wrong[suspicion.argsort(descending=True)].cumsum(0)[:count]
        ranks = torch.arange(1, count + 1)
        ax.plot(ranks.tolist(), (hits / ranks).tolist(), label=method, color=colour)
    ax.axhline(float(is_wrong.mean()), color="0.6", linestyle=":", label="by chance")
    ax.set_xlabel("suspects")
    ax.set_ylabel("share that is mislabelled")
    ax.set_ylim(0, 1.02)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    save(figure, name)


if __name__ == "__main__":
    run("influence.md", _draw)
