"""Draws the figures of docs/concepts.md, from what its own code computes.

Run `python -m docs.figures.concepts` from the root of the repository, with `pip install -e
'.[plot]'`.
"""

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures.page import run, save
from examples.docked_poses.arrays import Pose
from examples.docked_poses.arrays import load as load_poses
from posegrad import plot

INK, QUIET, PALE, BLUE = "#22272e", "#7c8590", "#d5d9de", "#3d7fb0"
SHOWN = (0, 6, 15)  # Vina's best, the one nearest to the reference, Vina's worst
BOND = 1.95  # Å, between heavy atoms


def poses(found: dict[str, Any]) -> Figure:
    """Three poses and the protein around them, seen along the pocket's shortest axis."""
    group: list[Pose] = load_poses("tyk2")[:16]
    ligands = torch.cat([pose.xyz[: pose.n_ligand] for pose in group])
    centre = ligands.mean(0)
    _, _, axes = torch.linalg.svd(ligands - centre, full_matrices=False)  # [3, 3]
    figure = Figure(figsize=(9.2, 2.6), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharex=True, sharey=True)
    for ax, number in zip(panels, SHOWN, strict=True):
        pose = group[number]
        _draw_pose(ax, (pose.xyz - centre) @ axes[:2].T, pose)
        words = f"pose {number}: Vina {pose.vina:.1f} kcal/mol, {pose.rmsd:.1f} Å off"
        ax.set_title(words, color=INK, fontsize=9, loc="left")
    return figure


def _draw_pose(ax: Axes, flat: Tensor, pose: Pose) -> None:
    ligand = pose.xyz[: pose.n_ligand]
    near = (torch.cdist(ligand, ligand) < BOND).triu(1).nonzero()
    bonds = [flat[pair].tolist() for pair in near]
    carbon = (pose.z[: pose.n_ligand] == 6).tolist()
    own, protein = flat[: pose.n_ligand], flat[pose.n_ligand :]
    ax.scatter(*protein.T.tolist(), s=12, color=PALE, lw=0)
    ax.add_collection(LineCollection(bonds, colors=BLUE, linewidths=1.6))
    ax.scatter(
        *own.T.tolist(), s=20, zorder=3, lw=1, edgecolor=BLUE,
        facecolor=[BLUE if c else "white" for c in carbon],
    )  # fmt: skip
    ax.set_aspect("equal")
    ax.set_axis_off()


def rules(found: dict[str, Any]) -> Figure:
    """The weights of the same predictions under three rules."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    panels = figure.subplots(1, len(found["rules"]))
    for ax, rule, weights in zip(panels, found["rules"], found["weights"], strict=True):
        plot.weights(weights, ax=ax)
        ax.tick_params(axis="x", labelsize=6)
        ax.set_title(f"{rule}", loc="left", color=INK)
        ax.set_ylabel("")
    panels[0].set_ylabel("weight", color=INK)
    return figure


def jacobian(found: dict[str, Any]) -> Figure:
    """The rows themselves, and their cosines."""
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    rows = found["J"].matrix()
    top = float(rows.abs().quantile(0.98))
    left.imshow(rows, aspect="auto", cmap="PuOr_r", vmin=-top, vmax=top, interpolation="nearest")
    left.set_title(f"J, {rows.shape[0]} poses by {rows.shape[1]} parameters", loc="left", color=INK)
    left.set(xlabel="parameter", ylabel="pose")
    left.spines[:].set_visible(False)
    left.tick_params(colors=QUIET, labelcolor=INK, length=0)
    plot.gramian(found["G"], ax=right).set_title("G, as cosines", loc="left", color=INK)
    return figure


def schedules(found: dict[str, Any]) -> Figure:
    """What each would hold."""
    return plot.memory(found["plans"]).figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "concepts-pose.svg": poses,
    "concepts-rule.svg": rules,
    "concepts-jacobian.svg": jacobian,
    "concepts-schedule.svg": schedules,
}


if __name__ == "__main__":
    run("concepts.md", lambda name, found: save(FIGURES[name](found), name))
