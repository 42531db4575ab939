"""Fine-tunes PIGNet2 on docked poses, and compares what it costs and what it gives."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from examples.docked_poses import cost, report
from examples.docked_poses.arrays import KT
from examples.docked_poses.compounds import NATIVE, Compound, load
from examples.docked_poses.crossval import Job, cross_validate
from examples.docked_poses.finetune import score
from examples.docked_poses.picture import draw
from examples.docked_poses.pignet import pretrained
from posegrad import Boltzmann, Combination, Mean, Min

__all__ = ["main"]

SOFT_MINIMUM = "soft minimum, Min(scale=1/kT)"
RULES: dict[str, Combination] = {
    "mean, Mean()": Mean(),
    "Boltzmann average, Boltzmann(kT)": Boltzmann(kT=KT),
    SOFT_MINIMUM: Min(scale=1 / KT),
    "sharp minimum, Min(scale=1000)": Min(scale=1000.0),
}


def main() -> None:
    """Loads, measures, trains, prints and draws."""
    args, start = _arguments(), time.perf_counter()
    torch.set_flush_denormal(True)  # some backwards are several times slower without it
    torch.set_num_threads(1)  # the steadier clock, and the workers need the other cores

    compounds = load()
    poses = sum(len(compound.poses) for compound in compounds)
    found = sum(bool((compound.rmsd < NATIVE).any()) for compound in compounds)
    print(
        f"TYK2: {len(compounds)} compounds with measured ΔG, {poses} docked poses. "
        f"{found} of the compounds ({found / len(compounds):.0%}) have a pose within {NATIVE:g} Å "
        "of the reference.\n"
    )
    _compare_costs(compounds[0])
    _compare_rules(compounds, args)
    print(f"\nPicture: {args.output}\nTotal: {time.perf_counter() - start:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.docked_poses", description=__doc__)
    parser.add_argument("--folds", type=int, default=4, help="parts held out in turn")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training compounds")
    parser.add_argument("--lr", type=float, default=6e-4, help="learning rate of Adam")
    parser.add_argument("--batch", type=int, default=1, help="compounds in one optimizer step")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that train"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "out" / "docked_poses.png",
        help="where the picture goes",
    )
    return parser.parse_args()


def _compare_costs(compound: Compound) -> None:
    for words, rule in (("sharp minimum", Min(scale=1000.0)), ("mean", Mean())):
        costs = cost.measure(compound, rule)
        print(f"One training step, {len(compound.poses)} poses of {compound.name}, {words}")
        print(report.cost_table(costs), end="\n\n")


def _compare_rules(compounds: Sequence[Compound], args: argparse.Namespace) -> None:
    settings = {"epochs": args.epochs, "lr": args.lr, "batch": args.batch}
    jobs = [Job(name, rule, **settings) for name, rule in RULES.items()]
    jobs.append(Job("Vina's top pose alone", Mean(), poses=1, **settings))
    model = pretrained()
    bar = tqdm(compounds, desc="Scoring", unit="compound", leave=False)
    before = {i: score(model, compound) for i, compound in enumerate(bar)}
    after = cross_validate(compounds, jobs, k=args.folds, workers=args.workers)

    rows = [
        report.Row(
            job.name,
            report.quality(compounds, before, job),
            report.quality(compounds, after[job.name].per_pose, job),
            after[job.name].effort,
        )
        for job in jobs
    ]
    rows.append(
        report.Row("a constant", report.Quality(), report.constant(compounds, k=args.folds))
    )
    print(
        f"Before and after fine-tuning, held out: {args.folds} folds over compounds, "
        f"epochs {args.epochs}, Adam {args.lr:g}, compounds a step {args.batch}"
    )
    print(report.rule_table(rows))
    draw(compounds, before, after[SOFT_MINIMUM].per_pose, RULES[SOFT_MINIMUM], args.output)
