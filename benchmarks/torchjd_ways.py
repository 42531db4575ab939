"""TorchJD's ways to Gramians: its engine, and its rows by `autojac`."""

import torch
from torch import nn

from benchmarks.cases import Problem
from benchmarks.per_pose import Found, Step, named

__all__ = ["autojac_rows", "owners", "torchjd"]


def torchjd(batch_dim: int | None, network: nn.Module) -> Step:
    """TorchJD's Gramian, then a backward under the weights.

    The engine is given each layer once. `Engine(network)` hooks a module that two others hold
    twice, and counts it twice: SchNet's filter networks, an error of 14 % of the Gramian.
    """
    from torchjd.autogram import Engine

    engine = Engine(*owners(network, set()), batch_dim=batch_dim)
    parameters = dict(network.named_parameters())

    def step(problem: Problem) -> Found:
        y = network(*problem.inputs).squeeze(1)
        gramian = engine.compute_gramian(y)
        gradients = torch.autograd.grad(y, list(parameters.values()), problem.weights)
        return gramian, named(parameters, gradients)

    return step


def autojac_rows(network: nn.Module) -> Step:
    """TorchJD's rows: one batched backward over the whole graph."""
    from torchjd.autojac import jac

    parameters = dict(network.named_parameters())

    def step(problem: Problem) -> Found:
        y = network(*problem.inputs).squeeze(1)
        return None, named(parameters, jac(y, list(parameters.values())))

    return step


def owners(module: nn.Module, seen: set[nn.Module]) -> list[nn.Module]:
    """The modules that TorchJD hooks, each once: the first on each path with own parameters."""
    if module in seen:
        return []
    seen.add(module)
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return [module]
    return [owner for child in module.children() for owner in owners(child, seen)]
