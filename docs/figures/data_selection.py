"""Draws the figure of docs/data-selection.md from what its code computes.

Run `python -m docs.figures.data_selection` from the root of the repository, with
`pip install -e '.[plot]' 'scikit-learn>=1.5'`.
"""

from typing import Any

from matplotlib.figure import Figure

from docs.figures.page import run, save

COLOURS = ("#1b7837", "#d6604d", "#9aa5b1", "#5b6770")


def _draw(name: str, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    shares, accuracies = figure.subplots(1, 2)
    is_useful = found["is_useful"].float()
    each = range(2, 61, 2)
    for (method, scores), colour in zip(found["rankings"].items(), COLOURS, strict=False):
        found_useful = [float(is_useful[found["best"](scores, k)].mean()) for k in each]
        shares.plot([10 * k for k in each], found_useful, label=method, color=colour)
    shares.axhline(float(is_useful.mean()), color="0.6", linestyle=":", label="by chance")
    shares.set_xlabel("candidates chosen")
    shares.set_ylabel("share that is useful")
    shares.set_ylim(0, 1.02)
    shares.legend(frameon=False)
    for place, (runs, colour) in enumerate(zip(found["accuracies"].values(), COLOURS, strict=True)):
        accuracies.bar(place, sum(runs) / len(runs), color=colour, width=0.6)
        accuracies.plot([place] * len(runs), runs, "k.", markersize=4)
    labels = [
        text.replace(" by ", "\nby ").replace("300 ", "300\n") for text in found["accuracies"]
    ]
    accuracies.set_xticks(range(len(labels)), labels)
    accuracies.set_ylabel("accuracy on tests")
    accuracies.set_ylim(0, 1.02)
    for ax in (shares, accuracies):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, name)


if __name__ == "__main__":
    run("data-selection.md", _draw)
