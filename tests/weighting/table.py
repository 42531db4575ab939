"""Every rule of the library that looks at gradients, beside its formula on plain rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchjd.aggregation import DualProjWeighting, UPGradWeighting

from posegrad import Clip, Mean, Median, Min, Projected, SignAgreement, TrimmedMean
from posegrad.weighting import GradientRule

__all__ = ["RULES", "Row"]

Formula = Callable[[Tensor, Tensor], Tensor]
"""From J `[M, n]` and the predictions `[M]` to the gradient `[n]`."""


@dataclass(frozen=True)
class Row:
    """A rule, and what it should give.

    Args:
        make: The rule.
        formula: By plain operations on J.
        weights: Whether it has any.
        least: The fewest rows it takes.
    """

    make: Callable[[], GradientRule]
    formula: Formula
    weights: bool = False
    least: int = 1


def _clipped(norm: float, rows: Tensor, _: Tensor) -> Tensor:
    return sum(row * min(1.0, norm / float(row.norm())) for row in rows)  # type: ignore[return-value]


def _trimmed(trim: int, rows: Tensor, _: Tensor) -> Tensor:
    columns = [sorted(column)[trim : len(column) - trim] for column in rows.T.tolist()]
    return torch.tensor([sum(column) / len(column) for column in columns], dtype=rows.dtype)


def _middle(rows: Tensor, _: Tensor) -> Tensor:
    return torch.quantile(rows, 0.5, dim=0)


def _agreed(threshold: float, rows: Tensor, _: Tensor) -> Tensor:
    up, down = (rows > 0).sum(0), (rows < 0).sum(0)
    wanted = math.ceil(threshold * len(rows) - 1e-9)
    return rows.mean(0) * ((up - down).abs() >= wanted)


def _projected(
    kind: Callable[..., Callable[[Tensor], Tensor]], scale: float, rows: Tensor, y: Tensor
) -> Tensor:
    preference = torch.softmax(-scale * y, dim=0) if scale else torch.full_like(y, 1 / len(y))
    return kind(pref_vector=preference)(rows @ rows.mT) @ rows


# A rule that is added here gets the tests of this folder.
RULES: dict[str, Row] = {
    "Clip": Row(lambda: Clip(0.5), partial(_clipped, 0.5), weights=True),
    "Clip, all": Row(lambda: Clip(1e-3), partial(_clipped, 1e-3), weights=True),
    "Clip, none": Row(lambda: Clip(1e12), lambda rows, _: rows.sum(0), weights=True),
    "Projected, DualProj": Row(
        lambda: Projected(Min(scale=0.7), DualProjWeighting),
        partial(_projected, DualProjWeighting, 0.7),
        weights=True,
    ),
    "Projected, UPGrad": Row(
        lambda: Projected(Mean(), UPGradWeighting),
        partial(_projected, UPGradWeighting, 0.0),
        weights=True,
    ),
    "TrimmedMean(1)": Row(lambda: TrimmedMean(1), partial(_trimmed, 1), least=3),
    "TrimmedMean(2)": Row(lambda: TrimmedMean(2), partial(_trimmed, 2), least=5),
    "Median": Row(Median, _middle),
    "SignAgreement(0)": Row(lambda: SignAgreement(0.0), lambda rows, _: rows.mean(0)),
    "SignAgreement(0.6)": Row(lambda: SignAgreement(0.6), partial(_agreed, 0.6)),
    "SignAgreement(1)": Row(lambda: SignAgreement(1.0), partial(_agreed, 1.0)),
}
