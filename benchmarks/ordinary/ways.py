"""Steps on the losses of a batch: plain, posegrad's, and the naive ways.

A way is bound to a problem's copy of the network once, and then called as `step()`. It runs the
forward too. What it returns goes by the task: norms `[m]`, a Gramian `[m, m]`, or nothing; gradients
are left in `.grad`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.ordinary.problem import Problem
from posegrad import Clip, Engine

__all__ = [
    "MAX_NORM",
    "Bind",
    "Rows",
    "Step",
    "clipped",
    "loop",
    "loop_clipped",
    "norms",
    "of_rows",
    "plain",
    "products",
    "projected",
    "vmapped",
]

Step = Callable[[], Tensor | None]
Bind = Callable[[Problem], Step]
Rows = Callable[[], dict[nn.Parameter, Tensor]]

MAX_NORM = 1.0


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a gradient."""
    return [p for p in network.parameters() if p.requires_grad]


def plain(problem: Problem) -> Step:
    """Forward and backward of the summed losses: the unit."""

    def step() -> None:
        problem.network.zero_grad()
        problem.of(problem.network).sum().backward()

    return step


def norms(problem: Problem) -> Step:
    """The norm of each row."""
    engine = Engine(problem.network)

    def step() -> Tensor:
        return engine.jacobian(problem.of(problem.network)).norms()

    return step


def clipped(problem: Problem) -> Step:
    """The sum of clipped rows."""
    engine = Engine(problem.network)

    def step() -> None:
        problem.network.zero_grad()
        engine.backward(problem.of(problem.network), Clip(MAX_NORM))

    return step


def products(problem: Problem) -> Step:
    """The Gramian, and the weighted sum of rows."""
    engine = Engine(problem.network)

    def step() -> Tensor:
        problem.network.zero_grad()
        J = engine.jacobian(problem.of(problem.network))
        gramian = J.gramian()
        J.backward(problem.weights)
        return gramian

    return step


def projected(problem: Problem) -> Step:
    """TorchJD's UPGrad on posegrad's Gramian."""
    from torchjd.aggregation import UPGradWeighting

    engine, rule = Engine(problem.network), UPGradWeighting()

    def step() -> None:
        problem.network.zero_grad()
        engine.backward(problem.of(problem.network), rule)

    return step


def loop(problem: Problem) -> Rows:
    """Rows by one backward each, over one graph."""
    leaves = trained(problem.network)

    def rows() -> dict[nn.Parameter, Tensor]:
        each = zip(*_each(problem, leaves), strict=True)
        return dict(zip(leaves, map(torch.stack, each), strict=True))

    return rows


def loop_clipped(problem: Problem) -> Step:
    """Rows by one backward each, clipped and added one by one: no more than one is held."""
    leaves = trained(problem.network)

    def step() -> None:
        problem.network.zero_grad()
        totals = [torch.zeros_like(p) for p in leaves]
        for row in _each(problem, leaves):
            norm = torch.stack(torch._foreach_norm(row)).norm()
            share = float((MAX_NORM / norm).clamp(max=1.0))
            torch._foreach_add_(totals, row, alpha=share)
        for p, total in zip(leaves, totals, strict=True):
            p.grad = total

    return step


def _each(problem: Problem, leaves: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    losses = problem.of(problem.network)
    for i, loss in enumerate(losses):
        kept = i < len(losses) - 1
        row = torch.autograd.grad(loss, leaves, retain_graph=kept, allow_unused=True)
        yield [torch.zeros_like(p) if r is None else r for p, r in zip(leaves, row, strict=True)]


def vmapped(problem: Problem) -> Rows:
    """Rows by `torch.func`: the gradient of one pose, over all of them at once."""
    network = problem.network
    leaves = {n: p for n, p in network.named_parameters() if p.requires_grad}
    values = {n: p.detach() for n, p in leaves.items()}

    def loss(values: dict[str, Tensor], *pose: Tensor) -> Tensor:
        def called(*args: Any, **more: Any) -> Any:
            return functional_call(network, values, args, more)

        return problem.losses(called, *(x.unsqueeze(0) for x in pose)).squeeze(0)

    dims = (None, *(0 for _ in problem.inputs))
    randomness = "different" if problem.is_random else "error"
    gradients = vmap(grad(loss), in_dims=dims, randomness=randomness)

    def rows() -> dict[nn.Parameter, Tensor]:
        return {leaves[n]: r for n, r in gradients(values, *problem.inputs).items()}

    return rows


def of_rows(rows_of: Callable[[Problem], Rows], then: str, problem: Problem) -> Step:
    """What a user of rows writes next, to come to a task's end."""
    return partial(_ENDS[then], problem, rows_of(problem))


def _norms(problem: Problem, rows: Rows) -> Tensor:
    flat = [r.flatten(1) for r in rows().values()]
    return torch.stack([r.norm(dim=1) for r in flat]).norm(dim=0)


def _clipped(problem: Problem, rows: Rows) -> None:
    flat = {p: r.flatten(1) for p, r in rows().items()}
    norms = torch.stack([r.norm(dim=1) for r in flat.values()]).norm(dim=0)
    _deposit(flat, (MAX_NORM / norms).clamp(max=1.0))


def _products(problem: Problem, rows: Rows) -> Tensor:
    flat = {p: r.flatten(1) for p, r in rows().items()}
    gramian = problem.weights.new_zeros(problem.m, problem.m)
    for r in flat.values():
        gramian.addmm_(r, r.T)
    _deposit(flat, problem.weights)
    return gramian


def _projected(problem: Problem, rows: Rows) -> None:
    from torchjd.aggregation import UPGradWeighting

    flat = {p: r.flatten(1) for p, r in rows().items()}
    gramian = problem.weights.new_zeros(problem.m, problem.m)
    for r in flat.values():
        gramian.addmm_(r, r.T)
    _deposit(flat, UPGradWeighting()(gramian))


_ENDS = {"norms": _norms, "clip": _clipped, "gramian": _products, "upgrad": _projected}


def _deposit(rows: dict[nn.Parameter, Tensor], weights: Tensor) -> None:
    for p, r in rows.items():
        p.grad = (weights @ r).view_as(p)
