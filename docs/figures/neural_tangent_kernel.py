"""Draws the figure of docs/neural-tangent-kernel.md from what its code computes.

Run `python -m docs.figures.neural_tangent_kernel` from the root of the repository, with
`pip install -e '.[plot]'`.
"""

from typing import Any

from matplotlib.figure import Figure

from docs.figures.page import run, save


def _draw(name: str, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    left.imshow(found["kernel"].numpy(), cmap="Greens")
    left.set_title("kernel of the training points", fontsize=9)
    left.set_xticks([])
    left.set_yticks([])
    grid = found["grid"].squeeze(1).tolist()
    right.plot(grid, found["at_grid"].tolist(), color="0.7", label="before")
    right.plot(grid, found["linear"].tolist(), color="#1b7837", label="kernel")
    right.plot(grid, found["trained"].tolist(), "--", color="#d6604d", label="trained network")
    right.plot(found["x"].squeeze(1).tolist(), found["y"].tolist(), "ko", markersize=4)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    save(figure, name)


if __name__ == "__main__":
    run("neural-tangent-kernel.md", _draw)
