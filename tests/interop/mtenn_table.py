"""mtenn's combinations, ours, and what both must be; the stand-in's models, and losses of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posegrad.interop.mtenn import BoltzmannCombination, MaxCombination, MeanCombination
from tests.device import seeded
from tests.interop import mtenn_standin as standin

__all__ = [
    "COMBINATIONS",
    "Combine",
    "close",
    "gradients",
    "group",
    "loss",
    "poses_of",
    "single",
    "stepped",
]

Combine = Callable[[Tensor], Tensor]


def _max(scale: float, **options: Any) -> tuple[Any, Combine, Any]:
    ours, theirs = (partial(kind, **options) for kind in (MaxCombination, standin.MaxCombination))
    return ours, lambda y: torch.logsumexp(scale * y, dim=0) / scale, theirs


def _boltzmann(y: Tensor) -> Tensor:
    return (torch.softmax(-y, dim=0) * y).sum()


COMBINATIONS: dict[str, tuple[Any, Combine, Any]] = {
    "mean": (MeanCombination, torch.mean, standin.MeanCombination),
    "min": _max(-1000.0),
    "soft min": _max(-1.7, pred_scale=1.7),
    "max": _max(3.0, negate_preds=False, pred_scale=3.0),
    "boltzmann": (BoltzmannCombination, _boltzmann, standin.BoltzmannCombination),
}
"""Makes ours; what it must be; makes the stand-in's, whose gradient is written by hand."""


def single(width: int = 6, numbers: int = 1, readout: Any = None) -> standin.Model:
    """A model of one pose, whose prediction is `[1, numbers]`."""
    torch.manual_seed(1)
    energy = nn.Sequential(nn.Tanh(), nn.Linear(width, numbers))
    layers = standin.Representation(width), standin.DeltaStrategy(energy)
    return standin.Model(*layers, readout).double()


def group(combination: Any, *readouts: Any, **of_single: Any) -> standin.GroupedModel:
    """The stand-in's GroupedModel of the same model."""
    model = single(**of_single)
    return standin.GroupedModel(model.representation, model.strategy, combination, *readouts)


def poses_of(count: int, seed: int = 0, *, trained: bool = False) -> list[standin.Pose]:
    """Poses of six atoms, the first two of which are the ligand's."""
    generator, side = seeded(seed), torch.tensor([True] * 2 + [False] * 4)
    draws = [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [{"pos": draw.requires_grad_(trained), "lig": side} for draw in draws]


def loss(combined: Tensor, per_pose: Tensor) -> Tensor:
    """Of both outputs, with weights of both signs."""
    signs = torch.cos(3 * torch.arange(per_pose.numel(), dtype=per_pose.dtype) + 1)
    return (combined - 1.5).square().sum() + (signs * per_pose.flatten()).sum()


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """What `.grad` holds, by name."""
    return {name: p.grad for name, p in module.named_parameters()}


def stepped(module: nn.Module, outputs: tuple[Tensor, Tensor]) -> list[Any]:
    """Both outputs, and the gradients of their loss."""
    module.zero_grad()
    loss(*outputs).backward()
    return [*(output.detach() for output in outputs), gradients(module)]


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compares tensors, and lists and dicts of them."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
