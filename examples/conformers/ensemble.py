"""A network that scores conformers, a rule that combines them, and held-out predictions."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from examples.conformers.baseline import ridge
from examples.conformers.molecules import Compound
from examples.docked_poses.network import schnet
from posegrad import Budget, Combination, Engine, Max, Mean

__all__ = ["METHODS", "Score", "cross_validate", "table"]

# Affinities of conformers add up: K = Σ K_i, so pK = log10 Σ 10^pK_i. High is good: Max, not Min.
SUM_OF_AFFINITIES = Max(scale=math.log(10))

METHODS: dict[str, tuple[Combination, int | None]] = {
    "one conformer": (Mean(), 1),
    "ensemble, mean": (Mean(), None),
    "ensemble, log-sum of affinities": (SUM_OF_AFFINITIES, None),
}
"""How conformers are combined, and how many of each compound are used; None for all."""

BATCH = 8  # compounds in a step
ATOMS = 2048  # in a forward: what bounds the memory of a step, however many conformers there are


@dataclass(frozen=True)
class Score:
    """How good held-out predictions are.

    Attributes:
        rmse: In units of pIC50.
        pearson: Correlation with the measured values; nan for a constant.
    """

    rmse: float
    pearson: float


def score(model: nn.Module, conformers: Data) -> Tensor:
    """A pIC50 for each conformer of a batch, `[c]`."""
    return model(conformers.z, conformers.pos, conformers.batch).squeeze(-1)  # type: ignore[no-any-return]


def engine_of(model: nn.Module) -> Engine:
    """Scores conformers in batches of so many atoms."""
    budget = Budget(ATOMS, lambda conformer: conformer.num_nodes)
    return Engine(model, predict=score, collate=Batch.from_data_list, chunk_size=budget)


class Scaled(nn.Module):
    """A network whose outputs start at the mean of the training compounds.

    Args:
        network: Called as `network(z, pos, batch)`.
        mean: Of the measured values.
        spread: Their standard deviation.
    """

    def __init__(self, network: nn.Module, mean: float, spread: float) -> None:
        super().__init__()
        self.network, self.mean, self.spread = network, mean, spread

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        """Predictions `[c, 1]`."""
        return self.mean + self.spread * self.network(z, pos, batch)  # type: ignore[no-any-return]


def fresh(measured: Sequence[float], *, seed: int) -> nn.Module:
    """An untrained network for the scale of these values."""
    torch.manual_seed(seed)
    network = schnet(channels=32, interactions=2, gaussians=16, cutoff=5.0, readout="mean")
    return Scaled(network, float(np.mean(measured)), float(np.std(measured)))


def batches(count: int, generator: random.Random) -> Iterator[list[int]]:
    """All numbers below `count` in random order, `BATCH` at a time."""
    order = generator.sample(range(count), count)
    yield from (order[i : i + BATCH] for i in range(0, count, BATCH))


def train(
    model: nn.Module,
    groups: Sequence[list[Data]],
    measured: Sequence[float],
    rule: Combination,
    *,
    epochs: int,
    bar: "tqdm[None]",
) -> None:
    """Fits the combined predictions to the measured values; several compounds make one call."""
    engine, generator = engine_of(model), random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = epochs * math.ceil(len(groups) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for own in batches(len(groups), generator):
            poses = [conformer for i in own for conformer in groups[i]]
            sizes = [len(groups[i]) for i in own]
            prediction, _ = engine.combine(poses, rule, groups=sizes)  # [compounds]
            target = torch.tensor([measured[i] for i in own])
            (prediction - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update(len(own))


def predict(model: nn.Module, groups: Sequence[list[Data]], rule: Combination) -> np.ndarray:
    """Combined predictions, `[compounds]`."""
    poses = [conformer for group in groups for conformer in group]
    with torch.no_grad():
        prediction, _ = engine_of(model).combine(poses, rule, groups=[len(g) for g in groups])
    return prediction.numpy(force=True)


def cross_validate(
    compounds: Sequence[Compound], *, folds: int, epochs: int, methods: Sequence[str] | None = None
) -> dict[str, Score]:
    """Every method on the same folds; each compound is predicted by a model that never saw it.

    Args:
        compounds: All of them, in random order.
        folds: Compound i is held out in fold `i % folds`.
        epochs: Passes over the training compounds.
        methods: Names in `METHODS`; default all.
    """
    names = list(METHODS if methods is None else methods)
    measured = np.array([compound.pic50 for compound in compounds])
    prints = np.stack([compound.fingerprint for compound in compounds])
    found = {name: np.zeros_like(measured) for name in ("mean of the others", "2D ridge", *names)}
    total = (folds - 1) * len(compounds) * epochs * len(names)
    with tqdm(total=total, desc=f"{folds} folds, {epochs} epochs", unit="compound") as bar:
        for fold in range(folds):
            held = np.arange(len(compounds)) % folds == fold
            values = measured[~held]
            found["mean of the others"][held] = values.mean()
            found["2D ridge"][held] = ridge(prints[~held], values, prints[held])
            for name in names:
                rule, most = METHODS[name]
                groups = [compound.conformers[:most] for compound in compounds]
                fit = [group for group, out in zip(groups, held, strict=True) if not out]
                rest = [group for group, out in zip(groups, held, strict=True) if out]
                model = fresh(values.tolist(), seed=fold)
                train(model, fit, values.tolist(), rule, epochs=epochs, bar=bar)
                found[name][held] = predict(model, rest, rule)
    return {name: _score(predicted, measured) for name, predicted in found.items()}


def _score(predicted: np.ndarray, measured: np.ndarray) -> Score:
    rmse = float(np.sqrt(np.square(predicted - measured).mean()))
    return Score(rmse, float(np.corrcoef(predicted, measured)[0, 1]))


def table(scores: dict[str, Score]) -> str:
    """The scores as text, in the order they were given; nothing is left out."""
    width = max(map(len, scores))
    lines = [f"{'method':<{width}}  RMSE, pIC50  Pearson"]
    for name, own in scores.items():
        constant = name == "mean of the others"  # it differs between folds only, and against them
        pearson = "–" if constant else f"{own.pearson:.2f}"
        lines.append(f"{name:<{width}}  {own.rmse:>11.2f}  {pearson:>7}")
    return "\n".join(lines)
