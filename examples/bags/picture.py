"""The picture: which images of a bag carry its prediction."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, not a window

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from examples.bags.digits import SOUGHT, Bag
from examples.bags.training import Classifier

__all__ = ["draw"]

INK, NINE, WEIGHT = "#5C6670", "#D9480F", "#0B6E99"


@torch.no_grad()
def draw(classifiers: dict[str, Classifier], bags: Sequence[Bag], path: Path) -> None:
    """Writes a PNG: a row for each bag and classifier, an image and a bar for each instance.

    Args:
        classifiers: By name.
        bags: A few that they never saw.
        path: Where to; its folder is made.
    """
    rows = [(bag, name, classifiers[name]) for bag in bags for name in classifiers]
    most = max(len(bag.images) for bag in bags)
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(0.42 * most + 2.4, 1.15 * len(rows)), layout="constrained"
    )
    for axis, (bag, name, classifier) in zip(axes, rows, strict=True):
        logits, features = classifier([bag])
        weights = classifier.rule.pool.attention(features)
        label = "a nine" if bag.label else "no nine"
        text = f"{label}, {name}\nP(nine) = {float(logits.sigmoid()):.2f}"
        _row(axis, bag, weights, text, most)
    figure.suptitle("Attention to each image of a bag that was held out; a nine is framed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _row(axis: Axes, bag: Bag, weights: Tensor, text: str, most: int) -> None:
    for place, weight in enumerate(weights.tolist()):
        shown = 1 - bag.images.pixels[place, 0].numpy()
        axis.imshow(shown, cmap="gray", extent=(place + 0.06, place + 0.94, 0, 0.88), zorder=1)
        axis.bar(place + 0.5, weight, 0.7, bottom=1, color=WEIGHT)
        if int(bag.images.digits[place]) == SOUGHT:
            frame = plt.Rectangle((place + 0.02, -0.04), 0.96, 0.96, fill=False, color=NINE, lw=2)
            axis.add_patch(frame)
    axis.set(xlim=(0, most), ylim=(-0.08, 2.05), aspect="equal", xticks=[], yticks=[])
    axis.axhline(1, color=INK, lw=0.5)
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for spine in axis.spines.values():
        spine.set_visible(False)
