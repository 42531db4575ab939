"""The tables, as text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import spearmanr
from torch import Tensor

from examples.docked_poses.compounds import NATIVE, Compound
from examples.docked_poses.cost import Cost
from examples.docked_poses.crossval import Job, folds
from examples.docked_poses.finetune import Effort

__all__ = ["Quality", "Row", "constant", "cost_table", "quality", "rmse", "rule_table"]


def rmse(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Root mean squared error."""
    squares = [(p - m) ** 2 for p, m in zip(predicted, measured, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@dataclass(frozen=True)
class Quality:
    """How good one set of predictions is. What does not apply is nan.

    Attributes:
        rmse: Root mean squared error against the measured ΔG, kcal/mol.
        spearman: Rank correlation with the measured ΔG.
        found: Share of compounds whose pose of largest weight lies within 2 Å of the reference.
    """

    rmse: float = math.nan
    spearman: float = math.nan
    found: float = math.nan


@dataclass(frozen=True)
class Row:
    """One line of the table of rules.

    Attributes:
        name: What is combined, and how.
        before: Of the pretrained network.
        after: Held out, of the fine-tuned networks.
        effort: Poses run and differentiated in training.
    """

    name: str
    before: Quality
    after: Quality
    effort: Effort = field(default_factory=Effort)


def quality(
    compounds: Sequence[Compound], per_pose: Mapping[int, Sequence[float]], job: Job
) -> Quality:
    """Combines the predictions of every compound's poses and compares with experiment.

    Args:
        compounds: What was predicted.
        per_pose: For each compound, by index, the predictions of its poses.
        job: Its rule combines them; its poses are looked at.
    """
    predictions, found = [], []
    for i, compound in enumerate(compounds):
        scores = torch.tensor(per_pose[i][: job.poses])  # [m]
        predictions.append(float(job.rule(scores)))
        found.append(_found(job.rule.weights(scores), compound.rmsd))
    measured = [compound.dg for compound in compounds]
    rho = float(spearmanr(predictions, measured).statistic)
    return Quality(rmse(predictions, measured), rho, sum(found) / len(found))


def _found(weights: Tensor, rmsd: Tensor) -> float:
    """Whether the heaviest pose is near-native; nan where no pose is heavier than another."""
    if len(weights) > 1 and bool((weights == weights[0]).all()):
        return math.nan
    return float(rmsd[weights.argmax()] < NATIVE)


def constant(compounds: Sequence[Compound], *, k: int) -> Quality:
    """Predicts the mean ΔG of the training compounds, fold by fold."""
    measured = torch.tensor([compound.dg for compound in compounds])
    predicted = measured.clone()
    for held_out in folds(len(compounds), k):
        seen = torch.ones(len(compounds), dtype=torch.bool)
        seen[list(held_out)] = False
        predicted[list(held_out)] = measured[seen].mean()
    return Quality(rmse(predicted.tolist(), measured.tolist()))


def rule_table(rows: Iterable[Row]) -> str:
    """Accuracy of every row before and after fine-tuning, and the poses training touched."""
    header = ("rule", "RMSE, kcal/mol", "Spearman", "heaviest pose < 2 Å", "differentiated")
    body = [
        (
            row.name,
            _change(row, "rmse", ".2f"),
            _change(row, "spearman", ".2f"),
            _change(row, "found", ".0%"),
            f"{row.effort.differentiated} of {row.effort.run}" if row.effort.run else "–",
        )
        for row in rows
    ]
    return _table(header, body)


def cost_table(costs: Sequence[Cost]) -> str:
    """Time, memory and exactness of each way."""
    header = ("method", "CPU time", "of plain", "peak memory", "gradient error (float64)")
    body = [
        (
            cost.method,
            f"{cost.seconds:.2f} s",
            f"{cost.of_plain:.2f}",
            f"{cost.peak_mib:.1f} MiB",
            f"{cost.gradient_error:.0e}" if cost.gradient_error else "0",
        )
        for cost in costs
    ]
    return _table(header, body)


def _change(row: Row, attribute: str, form: str) -> str:
    """`before → after`, with a dash for what does not apply."""

    def text(quality: Quality) -> str:
        value = getattr(quality, attribute)
        return "–" if math.isnan(value) else format(value, form)

    before, after = text(row.before), text(row.after)
    return "–" if before == after == "–" else f"{before:>5} → {after:>5}"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join((first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)))

    return "\n".join((line(header), line(["─" * w for w in widths]), *map(line, body)))
