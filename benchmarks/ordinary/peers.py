"""Steps on the losses of a batch by Opacus, TorchJD and dattri-llm."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.exact import Named, gradients
from benchmarks.opacus_ways import hooked, packed
from benchmarks.ordinary.problem import MAX_NORM, Problem
from benchmarks.ordinary.ways import Found, Step
from benchmarks.torchjd_ways import owners

__all__ = ["dattri", "dattri_heard", "opacus_flat", "opacus_ghost", "torchjd", "torchjd_projected"]


def opacus_flat(problem: Problem) -> Step:
    """Opacus's clipping: all rows, their norms, the clipped sum. No noise."""
    from opacus.optimizers import DPOptimizer

    wrapped = hooked(problem.network)
    descent = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    optimizer = DPOptimizer(
        descent, noise_multiplier=0.0, max_grad_norm=MAX_NORM, expected_batch_size=1
    )

    def step() -> Found:
        optimizer.zero_grad(set_to_none=True)
        problem.of(wrapped).sum().backward()
        optimizer.clip_and_accumulate()
        return None, packed(_summed(problem), 0)

    return step


def _summed(problem: Problem) -> dict[str, Tensor]:
    named = problem.network.named_parameters()
    return {name: p.summed_grad for name, p in named if p.requires_grad}


def opacus_ghost(problem: Problem) -> Step:
    """Opacus's ghost clipping: norms in a first backward, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    from benchmarks.opacus_ways import split

    wrapped = GradSampleModuleFastGradientClipping(
        split(problem.network),
        loss_reduction="sum",
        max_grad_norm=MAX_NORM,
        use_ghost_clipping=True,
    )
    descent = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    optimizer = DPOptimizerFastGradientClipping(
        descent, noise_multiplier=0.0, max_grad_norm=MAX_NORM, expected_batch_size=1
    )

    def step() -> Found:
        optimizer.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(wrapped, optimizer, problem.of(wrapped), "sum").backward()
        return None, packed(gradients(problem.network), 0)

    return step


def torchjd(problem: Problem) -> Step:
    """TorchJD's Gramian, then a backward under the weights."""
    engine = _engine(problem)

    def step() -> Found:
        losses = problem.of(problem.network)
        gramian = engine.compute_gramian(losses)
        problem.network.zero_grad()
        losses.backward(problem.weights)
        return gramian, gradients(problem.network)

    return step


def torchjd_projected(problem: Problem) -> Step:
    """TorchJD's Gramian, and a backward under UPGrad's weights of it."""
    from torchjd.aggregation import UPGradWeighting

    engine, rule = _engine(problem), UPGradWeighting()

    def step() -> Found:
        losses = problem.of(problem.network)
        weights = rule(engine.compute_gramian(losses))
        problem.network.zero_grad()
        losses.backward(weights)
        return None, gradients(problem.network)

    return step


def _engine(problem: Problem) -> Any:
    from torchjd.autogram import Engine

    dim = 0 if problem.is_sliced else None
    return Engine(*owners(problem.network, set()), batch_dim=dim)


def dattri(problem: Problem) -> Step:
    """dattri-llm's Gramian from factors that its hooks hold, then a backward under the weights."""
    from dattri_llm import HookManager

    manager = HookManager(problem.network)

    def step() -> Found:
        with manager.collect():
            losses = problem.of(problem.network)
            losses.sum().backward(retain_graph=True)
            gradient = manager.get_gradient()
        gramian: Tensor = gradient.similarity(gradient, reduce="all")
        problem.network.zero_grad()
        losses.backward(problem.weights)
        found: Named = gradients(problem.network)
        return gramian, found

    return step


def dattri_heard(what: str, problem: Problem) -> Step:
    """A plain step that dattri-llm's hooks see, and norms or the Gramian of what they hold."""
    from dattri_llm import HookManager

    manager = HookManager(problem.network)

    def step() -> Found:
        problem.network.zero_grad()
        with manager.collect():
            problem.of(problem.network).sum().backward()
            gradient = manager.get_gradient()
        found: Tensor = gradient.similarity(gradient, reduce="all")
        if what == "norms":
            found = found.diagonal().sqrt()
        return found, gradients(problem.network)

    return step
