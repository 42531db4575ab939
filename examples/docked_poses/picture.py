"""The picture: which poses carry the weight, and what fine-tuning does to the predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, not a window

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from examples.docked_poses.compounds import NATIVE, Compound
from examples.docked_poses.report import rmse
from posegrad import Combination, plot

__all__ = ["draw"]

BEFORE, AFTER, VINA, GUIDE = "#9AA5B1", "#0B6E99", "#D9480F", "#5C6670"
SHOWN = 4  # compounds whose weights are shown pose by pose
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GUIDE,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
PerPose = Mapping[int, Sequence[float]]


def draw(
    compounds: Sequence[Compound], before: PerPose, after: PerPose, rule: Combination, path: Path
) -> None:
    """Writes a PNG of three panels.

    Args:
        compounds: What was predicted.
        before: Predictions of every compound's poses, pretrained network.
        after: The same, held out, fine-tuned networks.
        rule: Combines them, and weighs the poses.
        path: Where to; its folder is made.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(15.5, 4.8), layout="constrained")
        weights = [rule.weights(torch.tensor(after[i])) for i in range(len(compounds))]
        _poses(axes[0], compounds[:SHOWN], weights[:SHOWN])
        _weights(axes[1], compounds, weights)
        _predictions(axes[2], compounds, before, after, rule)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _poses(axes: Axes, compounds: Sequence[Compound], groups: Sequence[Tensor]) -> None:
    plot.weights(torch.cat([*groups]), groups=[len(own) for own in groups], ax=axes)
    for name, compound in zip(axes.texts, compounds, strict=True):
        name.set_text(compound.name)
    axes.set(ylabel="weight of the pose")
    axes.set_title(f"Weights of the poses of {len(compounds)} compounds", loc="left")


def _weights(axes: Axes, compounds: Sequence[Compound], groups: Sequence[Tensor]) -> None:
    weights, rmsd = torch.cat([*groups]), torch.cat([c.rmsd for c in compounds])  # [poses]
    share = float(weights[rmsd < NATIVE].sum() / len(compounds))

    axes.axvspan(0, NATIVE, color=AFTER, alpha=0.08, lw=0)
    axes.scatter(rmsd, weights, s=28, color=AFTER, alpha=0.6, lw=0, clip_on=False, label="a pose")
    axes.scatter(
        [compound.rmsd[0] for compound in compounds],
        [group[0] for group in groups],
        s=62,
        facecolor="none",
        edgecolor=VINA,
        lw=1.3,
        clip_on=False,
        label="Vina's top pose of a compound",
    )
    axes.text(
        NATIVE + 0.25, 0.73, f"{share:.0%} of all weight lies\nwithin {NATIVE:g} Å", color=AFTER
    )
    axes.set(xlim=(0, None), ylim=(0, 1), xlabel="RMSD to the reference pose, Å")
    axes.set(ylabel="weight of the pose", title="Which poses carry the gradient")
    axes.legend(loc="upper right")


def _predictions(
    axes: Axes, compounds: Sequence[Compound], before: PerPose, after: PerPose, rule: Combination
) -> None:
    measured = [compound.dg for compound in compounds]
    old = [float(rule(torch.tensor(before[i]))) for i in range(len(compounds))]
    new = [float(rule(torch.tensor(after[i]))) for i in range(len(compounds))]
    low, high = min(measured + old + new) - 0.5, max(measured + old + new) + 0.5

    ends = torch.tensor([low, high])
    axes.fill_between(ends, ends - 1, ends + 1, color=GUIDE, alpha=0.1, lw=0, label="± 1 kcal/mol")
    axes.plot(ends, ends, color=GUIDE, lw=1)
    axes.vlines(measured, old, new, color=BEFORE, lw=0.8, alpha=0.7)
    axes.scatter(
        measured,
        old,
        s=34,
        facecolor="white",
        edgecolor=BEFORE,
        label=f"pretrained, RMSE {rmse(old, measured):.2f}",
    )
    axes.scatter(
        measured,
        new,
        s=38,
        color=AFTER,
        zorder=3,
        label=f"fine-tuned, held out, RMSE {rmse(new, measured):.2f}",
    )
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(title="Predicted against measured")
    axes.set(xlabel="measured ΔG, kcal/mol", ylabel="predicted ΔG, kcal/mol")
    axes.legend(loc="upper left")
