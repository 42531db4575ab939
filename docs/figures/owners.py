"""Draws `owners.svg`: how two backwards tell the owner of every row of a ragged batch.

Run `python docs/figures/owners.py` with matplotlib installed. The numbers are real: three poses of
two, three and one atoms, their rows shuffled, through a layer, a nonlinearity and a sum over atoms.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn

ATOMS = torch.tensor([1, 0, 2, 1, 0, 1])  # the pose of each row
EXPONENTS = torch.tensor([3, -2, 1])  # of the probe, pose by pose
INK, QUIET, PALE = "#22272e", "#7c8590", "#eceef1"
POSES = ("#7fb2d9", "#e9a15f", "#8fbf88")
ACTIVATION, PARAMETER = "#ffffff", "#f3ead9"


def cotangents(model: nn.Sequential, rows: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangents `[rows, p]` behind the first layer."""
    hidden = model[0](rows)
    atoms = model[1:](hidden).squeeze(1)
    predictions = torch.zeros(3).index_add(0, ATOMS, atoms)
    (found,) = torch.autograd.grad(predictions, hidden, cotangent)
    return found


def graph(axes: Axes) -> None:
    """The graph, and the edges that are read."""
    axes.set(xlim=(0, 10), ylim=(0, 6.4))
    boxes = {
        "atoms  A": (0.2, 2.9, ACTIVATION),
        "A Wᵀ + b": (2.6, 2.9, ACTIVATION),
        "SiLU": (5.0, 2.9, ACTIVATION),
        "ŷ: Σ by pose": (7.4, 2.9, ACTIVATION),
        "W": (2.1, 0.9, PARAMETER),
        "b": (3.7, 0.9, PARAMETER),
    }
    for name, (x, y, colour) in boxes.items():
        width = 1.9 if y > 2 else 1.0
        axes.add_patch(
            FancyBboxPatch((x, y), width, 0.8, "round,pad=0.05", fc=colour, ec=INK, lw=0.8)
        )
        axes.text(x + width / 2, y + 0.4, name, ha="center", va="center", fontsize=9, color=INK)
    for x in (2.1, 4.5, 6.9):
        arrow(axes, (x, 3.3), (x + 0.5, 3.3), QUIET)
    arrow(axes, (2.7, 1.75), (3.2, 2.85), QUIET)
    arrow(axes, (4.1, 1.75), (3.8, 2.85), QUIET)
    arrow(axes, (8.4, 4.6), (4.6, 4.6), POSES[1], width=1.6)
    arrow(axes, (4.6, 4.6), (4.55, 3.45), POSES[1], width=1.6)
    axes.text(6.5, 4.7, "from ŷ", ha="center", va="bottom", fontsize=9, color=INK)
    axes.text(
        0.2,
        5.75,
        "one backward, stopped in front of W and b:",
        fontsize=9,
        color=INK,
        weight="bold",
    )
    axes.text(
        0.2, 5.2, "it asks for the cotangent B of the operator's output", fontsize=9, color=INK
    )
    axes.text(0.2, 0.1, "∂ŷᵢ/∂W = Σ bᵣ aᵣᵀ over the rows r of pose i", fontsize=9, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1
) -> None:
    """An arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": width, "color": colour}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def table(axes: Axes, values: Tensor, title: str, colours: list[str] | None = None) -> None:
    """Numbers in cells."""
    height, width = values.shape
    axes.set(xlim=(0, width), ylim=(height, -1))
    axes.text(0, -0.35, title, fontsize=9, color=INK, weight="bold")
    for row in range(height):
        for column in range(width):
            fill = colours[row] if colours else PALE
            axes.add_patch(plt.Rectangle((column, row), 0.96, 0.9, fc=fill, ec="none"))
            number = values[row, column].item()
            text = f"{number:.4f}" if values.dtype.is_floating_point else f"{int(number)}"
            axes.text(column + 0.48, row + 0.48, text, ha="center", va="center", fontsize=8)


def main() -> None:
    """Computes, draws, writes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 1))
    rows = torch.randn(len(ATOMS), 3)
    base = cotangents(model, rows, torch.ones(3))
    probed = cotangents(model, rows, torch.exp2(EXPONENTS.float()))
    ratio = torch.log2((probed / base)[:, :1])
    assert torch.equal(ratio[:, 0].long(), EXPONENTS[ATOMS]), "every row is scaled exactly"
    colours = [POSES[i] for i in ATOMS]
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "posegrad"}
    figure, axes = plt.subplots(
        1, 4, figsize=(10.4, 2.9), gridspec_kw={"width_ratios": [10, 6, 6, 2.2]}
    )
    graph(axes[0])
    table(axes[1], base, "B under cotangents 1, 1, 1")
    table(axes[2], probed, "B under 2³, 2⁻², 2¹")
    table(axes[3], ratio.long(), "log₂ of ratio", colours)
    for panel in axes:
        panel.set_axis_off()
    for i, colour in enumerate(POSES):
        figure.text(
            0.86 + 0.045 * i, 0.03, f"pose {i}", fontsize=8, color=INK, backgroundcolor=colour
        )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.12, wspace=0.08)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
