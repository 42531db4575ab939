"""Every rule of TorchJD 0.18, what it reads, and what TorchJD makes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import aggregation as theirs
from torchjd import autojac
from torchjd.linalg import QuadprogProjector

from posegrad import Engine, PoseJacobian
from tests import reference
from tests.architectures.row import draw
from tests.device import DEVICE

__all__ = [
    "ON_CPU_ONLY",
    "REFUSED",
    "RULES",
    "M",
    "Rule",
    "by_hand",
    "close",
    "gradient_of",
    "losses_of",
    "model_in",
    "of_autojac",
    "size_of",
    "step_of",
]

M = 6
"""The number of rows all of them take."""

WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])
EXACT = QuadprogProjector(norm_eps=0.0, reg_eps=1e-6)


@dataclass(frozen=True)
class Rule:
    """A rule.

    Args:
        make: A new one.
        given: A vector that `make` is given, in the dtype of the rows.
        reads: The statistic that TorchJD gives it: `"matrix"` to an aggregator and to a
            `Weighting[Matrix]`, `"gramian"` to a `Weighting[PSDMatrix]`.
        weights: Whether it tells them.
    """

    make: Callable[..., Any]
    given: Tensor | None = None
    reads: str = "matrix"
    weights: bool = True

    def new(self, dtype: torch.dtype = torch.float64) -> Any:
        """The rule, without a state."""
        return self.make() if self.given is None else self.make(self.given.to(dtype))


def _gramian(make: Callable[[], Any]) -> Rule:
    return Rule(make, reads="gramian")


RULES: dict[str, Rule] = {
    # Weightings.
    "AlignedMTLWeighting": _gramian(theirs.AlignedMTLWeighting),
    "CAGradWeighting": _gramian(lambda: theirs.CAGradWeighting(c=0.5)),
    "CRMOGMWeighting": _gramian(lambda: theirs.CRMOGMWeighting(theirs.UPGradWeighting())),
    "ConstantWeighting": Rule(theirs.ConstantWeighting, WEIGHTS),
    "DualProjWeighting": _gramian(theirs.DualProjWeighting),
    "ExcessMTLWeighting": Rule(theirs.ExcessMTLWeighting),
    "FairGradWeighting": _gramian(lambda: theirs.FairGradWeighting(alpha=1.0)),
    "GradVacWeighting": _gramian(theirs.GradVacWeighting),
    "IMTLGWeighting": _gramian(theirs.IMTLGWeighting),
    "KrumWeighting": _gramian(lambda: theirs.KrumWeighting(1, 2)),
    "MGDAWeighting": _gramian(theirs.MGDAWeighting),
    "MeanWeighting": Rule(theirs.MeanWeighting),
    "PCDWeighting": _gramian(theirs.PCDWeighting),
    "PCGradWeighting": _gramian(theirs.PCGradWeighting),
    "RandomWeighting": Rule(theirs.RandomWeighting),
    "SumWeighting": Rule(theirs.SumWeighting),
    "UPGradWeighting": _gramian(theirs.UPGradWeighting),
    # Aggregators.
    "AlignedMTL": Rule(theirs.AlignedMTL),
    "CAGrad": Rule(lambda: theirs.CAGrad(c=0.5)),
    "ConFIG": Rule(theirs.ConFIG, weights=False),
    "Constant": Rule(theirs.Constant, WEIGHTS),
    "DualProj": Rule(theirs.DualProj),
    "ExcessMTL": Rule(theirs.ExcessMTL),
    "FairGrad": Rule(lambda: theirs.FairGrad(alpha=1.0)),
    "GradDrop": Rule(theirs.GradDrop, weights=False),
    "GradVac": Rule(theirs.GradVac),
    "IMTLG": Rule(theirs.IMTLG),
    "Krum": Rule(lambda: theirs.Krum(1, 2)),
    "MGDA": Rule(theirs.MGDA),
    "Mean": Rule(theirs.Mean),
    "NashMTL": Rule(lambda: theirs.NashMTL(M, optim_niter=1)),
    "PCD": Rule(theirs.PCD),
    "PCGrad": Rule(theirs.PCGrad),
    "Random": Rule(theirs.Random),
    "Sum": Rule(theirs.Sum),
    "TrimmedMean": Rule(lambda: theirs.TrimmedMean(1), weights=False),
    "UPGrad": Rule(theirs.UPGrad),
    # With options, and inside each other.
    "UPGrad, preference": Rule(theirs.UPGrad, WEIGHTS.abs()),
    "DualProj, exact": Rule(lambda: theirs.DualProj(projector=EXACT)),
    "ConFIG, preference": Rule(theirs.ConFIG, WEIGHTS.abs(), weights=False),
    "GradDrop, leak": Rule(
        lambda leak: theirs.GradDrop(leak=leak), WEIGHTS.abs() / 3, weights=False
    ),
    "NashMTL, every other step": Rule(
        lambda: theirs.NashMTL(M, update_weights_every=2, optim_niter=1)
    ),
    "CRMOGM of Mean": Rule(lambda: theirs.CRMOGMWeighting(theirs.MeanWeighting())),
    "CRMOGM of ExcessMTL": Rule(lambda: theirs.CRMOGMWeighting(theirs.ExcessMTLWeighting())),
    "CRMOGM as an aggregator": Rule(
        lambda: theirs.GramianWeightedAggregator(theirs.CRMOGMWeighting(theirs.PCGradWeighting()))
    ),
    "a Gramian of unit rows": Rule(lambda: theirs.MGDAWeighting() << _cosines),
    "a composition as an aggregator": Rule(
        lambda: theirs.WeightedAggregator(theirs.UPGradWeighting() << _cosines)
    ),
    "Mean of a composition": Rule(lambda: theirs.MeanWeighting() << _cosines),
}

ON_CPU_ONLY = ("GradVac", "GradVacWeighting", "PCD", "PCDWeighting")
"""They make tensors on the default device for sums that they take on the CPU."""

if DEVICE.type != "cpu":
    RULES = {name: row for name, row in RULES.items() if name not in ON_CPU_ONLY}

REFUSED = ["MoDoWeighting", "SDMGradWeighting"]


def _cosines(matrix: Tensor) -> Tensor:
    units = torch.nn.functional.normalize(matrix, dim=1)
    return units @ units.mT


def model_in(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def losses_of(model: nn.Module, seed: int) -> Tensor:
    """`[M]`, some of which conflict."""
    dtype = next(model.parameters()).dtype
    return (model(draw(seed, M, 7).to(dtype)) - draw(seed + 100, M, 2).to(dtype)).square().sum(1)


@cache
def step_of(dtype: torch.dtype, seed: int) -> tuple[nn.Module, PoseJacobian]:
    """A model with TorchJD's `.jac` of some losses, and our Jacobian of the same."""
    model = model_in(dtype)
    J = Engine(model).jacobian(losses_of(model, seed))
    autojac.backward(losses_of(model, seed), parallel_chunk_size=1)
    return model, J


def of_autojac(row: Rule, rule: Any, model: nn.Module) -> tuple[Tensor, Tensor | None, float]:
    """The gradient, the weights, and how large gradients are, by TorchJD's own means."""
    parameters: list[Any] = list(model.parameters())
    matrix = torch.cat([p.jac.reshape(M, -1) for p in parameters], dim=1)
    if isinstance(rule, theirs.Aggregator):
        weights = autojac.jac_to_grad(parameters, rule, retain_jac=True)
        gradient = gradient_of(model)
    else:
        weights, gradient = by_hand(row, rule, matrix)
    return gradient, weights, size_of(matrix, weights)


def by_hand(row: Rule, rule: Any, matrix: Tensor) -> tuple[Tensor | None, Tensor]:
    """The weights, if the rule is a weighting, and the gradient."""
    if isinstance(rule, theirs.Aggregator):
        return None, rule(matrix)
    weights = rule(matrix if row.reads == "matrix" else matrix @ matrix.mT).clone()
    return weights, weights @ matrix


def size_of(matrix: Tensor, weights: Tensor | None) -> float:
    largest = 1.0 if weights is None else max(1.0, float(weights.abs().max()))
    return len(matrix) * float(matrix.norm(dim=1).max()) * largest


def gradient_of(model: nn.Module) -> Tensor:
    """What is in `.grad`, zeros for None; it is None afterwards."""
    trained = reference.trainable(model).values()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad()
    return torch.cat([g.reshape(-1) for g in found])


def close(found: Tensor, expected: Tensor | None, size: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=size)
