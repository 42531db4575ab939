"""Held-out predictions: every compound is scored by a model that never saw it.

The models are independent, so they are trained in processes of one thread each. On graphs as small
as these that takes a third less time than one process whose operators share the cores.
"""

import multiprocessing
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from examples.docked_poses.compounds import Compound
from examples.docked_poses.finetune import Effort, finetune, score
from examples.docked_poses.pignet import pretrained
from posegrad import Combination

__all__ = ["HeldOut", "Job", "cross_validate", "folds"]


@dataclass(frozen=True)
class Job:
    """One row of the table: a way to train. For a worker, one fold of it.

    Attributes:
        name: Name of the row.
        rule: How poses are combined.
        poses: How many poses a compound has, the best by Vina's score; None for all.
        epochs: Passes over the training compounds.
        batch: How many of them share an optimizer step.
        lr: Learning rate of Adam.
        held_out: Indices of the compounds to predict; all others are trained on.
    """

    name: str
    rule: Combination
    poses: int | None = None
    epochs: int = 1
    lr: float = 6e-4
    batch: int = 1
    held_out: tuple[int, ...] = ()


@dataclass
class HeldOut:
    """What the models of one row say of compounds they were not trained on.

    Attributes:
        per_pose: For each compound, by index, the predictions of its poses. Plain numbers, which
            cross between processes without shared memory.
        effort: Poses run and differentiated in training, all folds together.
    """

    per_pose: dict[int, list[float]] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)


def folds(n: int, k: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Splits `range(n)` at random into k parts of equal size, up to one."""
    order = random.Random(seed).sample(range(n), n)
    return [tuple(sorted(order[i::k])) for i in range(k)]


def cross_validate(
    compounds: Sequence[Compound], jobs: Sequence[Job], *, k: int, workers: int
) -> dict[str, HeldOut]:
    """Trains k models per job and predicts each compound with the one that never saw it.

    Args:
        compounds: All compounds.
        jobs: The rows; `held_out` is filled in here, the same folds for all.
        k: Number of folds.
        workers: Number of processes.

    Returns:
        For each job's name, predictions for all compounds.
    """
    parts = folds(len(compounds), k)
    work = [replace(job, held_out=part) for job in jobs for part in parts]
    rows = {job.name: HeldOut() for job in jobs}
    # Spawned, not forked: a forked child inherits OpenMP's locks but not its threads. The graphs
    # go as bytes: torch would pass each of their tensors as an open file of its own.
    pool = multiprocessing.get_context("spawn").Pool(
        min(workers, len(work)), _start, (pickle.dumps(list(compounds)),)
    )
    with pool, tqdm(total=len(work), desc="Fine-tuning", unit="model", leave=False) as bar:
        for name, result in pool.imap_unordered(_run, work):
            rows[name].per_pose |= result.per_pose
            rows[name].effort += result.effort
            bar.update()
    return rows


_compounds: list[Compound] = []  # of this worker process


def _start(pickled: bytes) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a setting of the thread: each process needs it
    _compounds.extend(pickle.loads(pickled))


def _run(job: Job) -> tuple[str, HeldOut]:
    compounds = [compound.top(job.poses) for compound in _compounds]
    training = [compound for i, compound in enumerate(compounds) if i not in job.held_out]
    model = pretrained()
    effort = finetune(model, training, job.rule, epochs=job.epochs, lr=job.lr, batch=job.batch)
    return job.name, HeldOut({i: score(model, compounds[i]) for i in job.held_out}, effort)
