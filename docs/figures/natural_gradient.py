"""Draws the figure of docs/natural-gradient.md from what its code computes.

Run `python -m docs.figures.natural_gradient` from the root of the repository, with
`pip install -e '.[plot]'`.
"""

from typing import Any

from matplotlib.figure import Figure

from docs.figures.page import run, save

COLOURS = ("#1b7837", "#9aa5b1", "#d6604d")


def _draw(name: str, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    for (method, curve), colour in zip(found["curves"].items(), COLOURS, strict=True):
        each = found["EVALUATIONS"] / len(curve)
        ax.semilogy([each * (i + 1) for i in range(len(curve))], curve, label=method, color=colour)
    ax.set_xlabel("evaluations of the residuals")
    ax.set_ylabel("mean squared residual")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    save(figure, name)


if __name__ == "__main__":
    run("natural-gradient.md", _draw)
