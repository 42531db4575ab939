"""Train a SchNet from scratch on the docked poses of three targets.

`python -m examples.docked_poses.schnet` needs PyTorch Geometric and no pretrained network. Each
compound has up to 16 Vina poses and one measured binding free energy. The network scores the
poses, a soft minimum at kT combines the scores, and the loss is on the combined score.

What to expect of it: little. 43 compounds do not teach a network with random weights what binds.
It can learn which target a pose belongs to and how that target's compounds bind on average, so the
line to beat is the mean of the target's training compounds, not the mean of all. Nothing tells it
which pose is right except that the combined score must explain the affinity, and on this little
data that is no better than chance. What the script shows is the training loop.
"""

import argparse
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.docked_poses.arrays import KT, Pose, by_ligand, load_all
from examples.docked_poses.network import schnet, score
from posegrad import Engine, Min

Compound = list[Pose]

RULE = Min(scale=1.0 / KT)
NEAR_NATIVE = 2.0  # Å


class HeldOut(NamedTuple):
    """What a method says of a compound it was not fitted to."""

    measured: float
    predicted: float
    rmsd: float | None = None  # of the pose with the largest weight, if the method has one


def train(
    model: nn.Module, compounds: Sequence[Compound], *, epochs: int, bar: "tqdm[None]"
) -> None:
    """Fits the combined scores to the measured free energies, four compounds a step."""
    engine = Engine(model, predict=score)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in shuffled_batches(compounds, 4):
            for poses in batch:
                prediction, _ = engine.combine(poses, RULE)
                loss = (prediction - poses[0].dg).square() / len(batch)
                loss.backward()  # into .grad; no pose's graph is alive by now
                bar.update()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, compounds: Sequence[Compound]) -> list[HeldOut]:
    """Combined score and heaviest pose of each compound."""
    engine = Engine(model, predict=score)
    results = []
    for poses in compounds:
        prediction, per_pose = engine.combine(poses, RULE)
        heaviest = poses[int(RULE.weights(per_pose).argmax())]
        results.append(HeldOut(poses[0].dg, float(prediction), heaviest.rmsd))
    return results


def cross_validate(
    compounds: Sequence[Compound], *, folds: int, epochs: int
) -> dict[str, list[HeldOut]]:
    """Results of each method; every compound is predicted by a model that never saw it."""
    table: dict[str, list[HeldOut]] = {}
    total = (
        (folds - 1) * len(compounds) * epochs
    )  # each compound is trained on in all folds but one
    with tqdm(total=total, desc=f"{folds} folds, {epochs} epochs", unit="compound") as bar:
        for fold in range(folds):
            held = list(compounds[fold::folds])
            fit = [poses for i, poses in enumerate(compounds) if i % folds != fold]
            model = fresh_network(fit, seed=fold)
            untrained = evaluate(model, held)
            train(model, fit, epochs=epochs, bar=bar)
            for name, results in {
                "mean of all": [HeldOut(c[0].dg, mean_energy(fit)) for c in held],
                "mean of target": [HeldOut(c[0].dg, mean_energy(fit, c[0].target)) for c in held],
                "Vina's best pose": [HeldOut(c[0].dg, c[0].vina, c[0].rmsd) for c in held],
                "SchNet, untrained": untrained,
                "SchNet, trained": evaluate(model, held),
            }.items():
                table.setdefault(name, []).extend(results)
    return table


def fresh_network(compounds: Sequence[Compound], *, seed: int) -> nn.Module:
    """A small SchNet whose scores start near the mean measured energy."""
    energies = torch.tensor([poses[0].dg for poses in compounds])
    torch.manual_seed(seed)
    mean, std = float(energies.mean()), float(energies.std())
    return schnet(channels=32, interactions=3, gaussians=25, readout="mean", mean=mean, std=std)


def mean_energy(compounds: Sequence[Compound], target: str | None = None) -> float:
    """Mean measured energy, of one target's compounds if one is named."""
    energies = [c[0].dg for c in compounds if target in (None, c[0].target)]
    return sum(energies) / len(energies)


def shuffled_batches(compounds: Sequence[Compound], size: int) -> list[list[Compound]]:
    """All compounds in random order, `size` at a time."""
    order = random.sample(compounds, len(compounds))
    return [order[i : i + size] for i in range(0, len(order), size)]


def report(table: dict[str, list[HeldOut]]) -> str:
    """One line a method: errors in kcal/mol."""
    lines = [f"{'held out':<20}{'RMSE':>8}{'Spearman':>10}{'heaviest pose < 2 Å':>22}"]
    for name, results in table.items():
        measured = torch.tensor([result.measured for result in results])
        predicted = torch.tensor([result.predicted for result in results])
        error = (measured - predicted).square().mean().sqrt()
        near = [r.rmsd < NEAR_NATIVE for r in results if r.rmsd is not None]
        share = f"{sum(near) / len(near):.0%}" if near else "-"
        rank = "-" if name == "mean of all" else f"{spearman(measured, predicted):.2f}"
        lines.append(f"{name:<20}{error:>8.2f}{rank:>10}{share:>22}")
    return "\n".join(lines)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks, ties sharing theirs."""
    ranks = [(x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1) for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.docked_poses.schnet")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_flush_denormal(True)  # SchNet's Gaussians underflow: ten times faster backward
    torch.set_num_threads(1)  # a pose of 90 atoms is too small to share
    random.seed(0)
    compounds = by_ligand(load_all())
    random.shuffle(compounds)
    compounds.sort(key=lambda poses: poses[0].target)  # so that each fold has some of every target
    table = cross_validate(compounds, folds=arguments.folds, epochs=arguments.epochs)
    poses = sum(map(len, compounds))
    chance = sum(p.rmsd < NEAR_NATIVE for c in compounds for p in c) / poses
    print(f"\n{len(compounds)} compounds, {poses} poses, {chance:.0%} of them within 2 Å\n")
    print(report(table))


if __name__ == "__main__":
    main()
