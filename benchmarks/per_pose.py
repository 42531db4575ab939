"""Ways to the gradients of single poses in one batch: torch's own and posegrad's.

A way is bound to a network once and then called as `step(problem)`, where
`network(*problem.inputs)` gives one number per pose, `[m, 1]`. It runs the forward too, and returns
a Gramian or None, and gradients by name: a sum over poses, or rows `[m, ...]`. All are exact: they
differ in time and memory only.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.cases import Problem
from benchmarks.exact import Named, gradients
from posegrad import Clip, Engine

__all__ = [
    "PLAIN",
    "Bind",
    "Found",
    "Step",
    "autograd_rows",
    "joined",
    "named",
    "of_rows",
    "plain",
    "plain_step",
    "posegrad",
    "posegrad_clipped",
    "posegrad_matrix",
    "posegrad_rows",
    "vmap_rows",
]

Found = tuple[Tensor | None, Named]
Step = Callable[[Problem], Found]
Bind = Callable[[nn.Module], Step]

PLAIN = "plain"


def plain(network: nn.Module) -> Step:
    """Forward and backward of the summed output: the unit. No Gramian comes of it."""
    parameters = dict(network.named_parameters())

    def step(problem: Problem) -> Found:
        total = network(*problem.inputs).sum()
        return None, named(parameters, torch.autograd.grad(total, list(parameters.values())))

    return step


def plain_step(network: nn.Module) -> Step:
    """As `plain`, in `.grad`, as a training step leaves it."""

    def step(problem: Problem) -> Found:
        network.zero_grad()
        network(*problem.inputs).sum().backward()
        return None, gradients(network)

    return step


def posegrad(network: nn.Module) -> Step:
    """The Gramian and the weighted gradient from one Jacobian in factors."""
    engine = Engine(network)

    def step(problem: Problem) -> Found:
        J = engine.jacobian(network(*problem.inputs).squeeze(1))
        return J.gramian(), J.combine(problem.weights)

    return step


def posegrad_clipped(network: nn.Module) -> Step:
    """The sum of clipped gradients, in `.grad`."""
    engine = Engine(network)

    def step(problem: Problem) -> Found:
        network.zero_grad()
        engine.backward(network(*problem.inputs).squeeze(1), Clip(problem.max_norm))
        return None, gradients(network)

    return step


def posegrad_rows(network: nn.Module) -> Step:
    """The rows of each parameter."""
    engine = Engine(network)

    def step(problem: Problem) -> Found:
        J = engine.jacobian(network(*problem.inputs).squeeze(1))
        return None, {name: J.block(name) for name in J.blocks}

    return step


def posegrad_matrix(network: nn.Module) -> Step:
    """The Jacobian in one matrix, `[m, n]`."""
    engine = Engine(network)
    parameters = dict(network.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def step(problem: Problem) -> Found:
        matrix = engine.jacobian(network(*problem.inputs).squeeze(1)).matrix()
        return None, named(parameters, matrix.split(sizes, dim=1))

    return step


def vmap_rows(network: nn.Module) -> Step:
    """`torch.func`: the gradient of one pose, over all of them at once."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def score(parameters: dict[str, Tensor], *pose: Tensor) -> Tensor:
        one = tuple(x.unsqueeze(0) for x in pose)
        y: Tensor = functional_call(network, parameters, one)
        return y.squeeze()

    def step(problem: Problem) -> Found:
        dims = (None, *(0 for _ in problem.inputs))
        return None, vmap(grad(score), in_dims=dims)(parameters, *problem.inputs)

    return step


def autograd_rows(network: nn.Module) -> Step:
    """One backward for each pose, over one graph."""
    parameters = dict(network.named_parameters())

    def step(problem: Problem) -> Found:
        y = network(*problem.inputs).squeeze(1)
        leaves, last = list(parameters.values()), len(y) - 1
        rows = [torch.autograd.grad(y[i], leaves, retain_graph=i < last) for i in range(len(y))]
        return None, named(parameters, [torch.stack(r) for r in zip(*rows, strict=True)])

    return step


def of_rows(rows: Bind, network: nn.Module) -> Step:
    """Gramian and weighted gradient from rows: what a user of rows writes next."""
    rows_of = rows(network)

    def step(problem: Problem) -> Found:
        rows, weights = rows_of(problem)[1], problem.weights
        flat = {name: r.flatten(1) for name, r in rows.items()}
        gramian = weights.new_zeros(len(weights), len(weights))
        for r in flat.values():
            gramian.addmm_(r, r.T)
        return gramian, {n: (weights @ r).view(rows[n].shape[1:]) for n, r in flat.items()}

    return step


def joined(rows: Bind, network: nn.Module) -> Step:
    """One matrix `[m, n]` from rows: what a user of rows writes next."""
    rows_of = rows(network)
    sizes = [p.numel() for p in network.parameters()]

    def step(problem: Problem) -> Found:
        rows = rows_of(problem)[1]
        matrix = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
        return None, named(rows, matrix.split(sizes, dim=1))

    return step


def named(parameters: Named, tensors: Sequence[Tensor]) -> Named:
    """Tensors under the names of the parameters."""
    return dict(zip(parameters, tensors, strict=True))
