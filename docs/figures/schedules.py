"""Draws `schedules.svg`: bytes alive through one training step, measured, for each schedule.

Run `python docs/figures/schedules.py` with matplotlib installed. Every operator's outputs are
counted until they are freed; the time of an operator is its shortest of several steps, so the
bookkeeping does not show. The model is a plain network whose graph is some nine times its
parameters, scoring eight poses.
"""

import time
import weakref
from collections.abc import Callable
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from torch import Tensor, UntypedStorage, nn

from posegrad import Boltzmann, Combination, Engine, Min
from posegrad._torch import TorchDispatchMode, tree_leaves

POSES, ROWS, WIDTH, LAYERS, REPEATS = 8, 1024, 256, 4, 15
SCHEDULES = ("retain", "store", "stream", "recompute")
HELD = {
    "retain": "m graphs",
    "store": "m gradients",
    "stream": "running sums",
    "recompute": "predictions",
}
RULES: dict[str, Combination] = {
    "a soft rule: every pose carries weight": Boltzmann(kT=1.0),
    "a sharp rule: one pose does": Min(scale=1000.0),
}
INK, QUIET, GHOST = "#22272e", "#7c8590", "#eceef1"
FORWARD, BACKWARD = "#7fb2d9", "#e9a15f"


class Moment(NamedTuple):
    """The state after one operator: seconds it took, bytes alive, and whether it was forward."""

    seconds: float
    alive: int
    forward: bool


class Recorder(TorchDispatchMode):
    """Notes a `Moment` after every operator."""

    def __init__(self, outside: set[int]) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self.forward = False
        self._outside = outside
        self._alive: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - begin
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._outside:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self._alive = {key: pair for key, pair in self._alive.items() if pair[0]() is not None}
        alive = sum(size for _, size in self._alive.values())
        self.moments.append(Moment(seconds, alive, self.forward))
        return out


class Scorer(nn.Module):
    """Atoms `[ROWS, WIDTH]` to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(LAYERS):
            self.layers.append(nn.Linear(WIDTH, WIDTH)).append(nn.SiLU())

    def forward(self, pose: Tensor) -> Tensor:
        """The mean over atoms and features, made large enough for poses to differ."""
        return 40_000 * self.layers(pose).mean()


def record(model: nn.Module, poses: Tensor, rule: Combination, schedule: str) -> list[Moment]:
    """One training step, operator by operator."""
    model.zero_grad()
    tensors = [poses, *model.parameters()]
    recorder = Recorder({tensor.untyped_storage()._cdata for tensor in tensors})

    def predict(module: Callable[[Tensor], Tensor], pose: Tensor) -> Tensor:
        recorder.forward = True
        prediction = module(pose)
        recorder.forward = False
        return prediction

    engine = Engine(model, predict=predict)
    engine.combine(
        list(poses[:2]), rule, schedule=schedule
    )  # its first group is scored with graphs
    with recorder:
        prediction, _ = engine.combine(list(poses), rule, schedule=schedule)
        prediction.square().backward()
        del prediction
    return recorder.moments


def typical(runs: list[list[Moment]]) -> list[Moment]:
    """One run with the shortest time of each operator, which other processes did not disturb."""
    return [
        same[0]._replace(seconds=min(moment.seconds for moment in same))
        for same in zip(*runs, strict=True)
    ]


def thinned(moments: list[Moment], unit: float) -> list[Moment]:
    """Joins operators too short to see, in units of one plain step, keeping the larger height."""
    out = [moments[0]._replace(seconds=moments[0].seconds / unit)]
    for seconds, alive, forward in moments[1:]:
        width, last = seconds / unit, out[-1]
        if width < 0.001 or (last.forward == forward and last.seconds < 0.005):
            out[-1] = last._replace(seconds=last.seconds + width, alive=max(last.alive, alive))
        else:
            out.append(Moment(width, alive, forward))
    return out


def draw(axes: Axes, moments: list[Moment], *, colour: str | None = None) -> None:
    """Fills the bytes alive over time, in the colour of what was running."""
    edges = [0.0, *accumulate(moment.seconds for moment in moments)]
    heights = [moment.alive / 2**20 for moment in moments]
    start = 0
    for forward, group in groupby(moments, key=lambda moment: moment.forward):
        stop = start + len(list(group))
        fill = colour or (FORWARD if forward else BACKWARD)
        axes.stairs(heights[start:stop], edges[start : stop + 1], fill=True, color=fill, lw=0)
        start = stop
    if colour is None:
        axes.stairs(heights, edges, color=INK, linewidth=0.6)


def style(axes: Axes) -> None:
    """Two quiet axes and nothing else."""
    axes.set(ylim=(0, 64), xlim=(0, 1.4), xticks=[0, 0.5, 1], yticks=[0, 30, 60])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=8, length=3)


def caption(axes: Axes, moments: list[Moment], schedule: str, *, named: bool) -> None:
    """What the panel shows, in one line above it."""
    peak = max(moment.alive for moment in moments) / 2**20
    steps = sum(moment.seconds for moment in moments)
    figures = f"peak {peak:.0f} MiB, time {steps:.2f}"
    above = {"transform": axes.transAxes, "y": 1.07}
    if named:
        axes.text(x=0, s=schedule, color=INK, fontsize=11, weight="bold", **above)
        axes.text(x=0.245, s=f"keeps {HELD[schedule]}", color=QUIET, fontsize=9, **above)
    axes.text(x=1, s=figures, color=INK, fontsize=9, ha="right", **above)


def measure(model: nn.Module, poses: Tensor, rule: Combination) -> dict[str, list[Moment]]:
    """A typical step under every schedule, in units of one plain step; all interleaved."""
    runs: dict[str, list[list[Moment]]] = {schedule: [] for schedule in SCHEDULES}
    for turn in range(REPEATS + 1):
        for schedule in SCHEDULES:
            moments = record(model, poses, rule, schedule)
            if turn > 0:  # the first warms up
                runs[schedule].append(moments)
    unit = sum(moment.seconds for moment in typical(runs["retain"]))
    return {schedule: thinned(typical(same), unit) for schedule, same in runs.items()}


def main() -> None:
    """Measures, draws, writes."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    model, poses = Scorer(), torch.randn(POSES, ROWS, WIDTH)
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "posegrad", "path.simplify": True}
    figure, grid = plt.subplots(4, 2, figsize=(9.6, 6.6), sharex=True, sharey=True)
    for column, (title, rule) in enumerate(RULES.items()):
        steps = measure(model, poses, rule)
        for axes, (schedule, moments) in zip(grid[:, column], steps.items(), strict=True):
            if schedule != "retain":
                draw(axes, steps["retain"], colour=GHOST)
            draw(axes, moments)
            style(axes)
            caption(axes, moments, schedule, named=column == 0)
        grid[0, column].set_title(title, color=INK, fontsize=11, loc="left", pad=32)
        grid[3, column].set_xlabel("time, in steps of plain autograd", color=QUIET, fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("MiB alive", color=QUIET, fontsize=8)
    figure.legend(
        handles=[
            Patch(color=FORWARD, label="scoring poses"),
            Patch(color=BACKWARD, label="differentiating"),
            Patch(color=GHOST, label="retain, for comparison"),
        ],
        loc="lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK,
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.065, right=0.985, top=0.885, bottom=0.125, hspace=0.5, wspace=0.08
    )
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
