"""Steps on the losses of a batch: plain, posegrad's, and those of people without a library.

A way is bound to a problem of its own once, and then called as `step()`. It runs the forward too.
It returns norms `[m]`, a Gramian `[m, m]` or nothing, and gradients by name: those of a training
step, in `.grad` of its problem's network.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.exact import Named, gradients
from benchmarks.ordinary.problem import MAX_NORM, Problem
from posegrad import Clip, Engine

__all__ = [
    "Bind",
    "Found",
    "Step",
    "clipped",
    "heard",
    "loop_clipped",
    "loop_rows",
    "norms",
    "of_rows",
    "plain",
    "products",
    "projected",
    "read_first",
    "vmap_rows",
]

Found = tuple[Tensor | None, Named]
Step = Callable[[], Found]
Bind = Callable[[Problem], Step]
Rows = Callable[[], dict[str, Tensor]]


def plain(problem: Problem) -> Step:
    """Forward and backward of the summed losses: the unit."""

    def step() -> Found:
        problem.network.zero_grad()
        problem.of(problem.network).sum().backward()
        return None, gradients(problem.network)

    return step


def norms(problem: Problem) -> Step:
    """The norm of each row, and no gradient."""
    engine = Engine(problem.network)

    def step() -> Found:
        return engine.jacobian(problem.of(problem.network)).norms(), {}

    return step


def clipped(problem: Problem) -> Step:
    """The sum of clipped rows."""
    engine = Engine(problem.network)

    def step() -> Found:
        problem.network.zero_grad()
        engine.backward(problem.of(problem.network), Clip(MAX_NORM))
        return None, gradients(problem.network)

    return step


def products(problem: Problem) -> Step:
    """The Gramian, and the weighted sum of rows."""
    engine = Engine(problem.network)

    def step() -> Found:
        problem.network.zero_grad()
        J = engine.jacobian(problem.of(problem.network))
        gramian = J.gramian()
        J.backward(problem.weights)
        return gramian, gradients(problem.network)

    return step


def projected(problem: Problem) -> Step:
    """TorchJD's UPGrad on posegrad's Gramian."""
    from torchjd.aggregation import UPGradWeighting

    engine, rule = Engine(problem.network), UPGradWeighting()

    def step() -> Found:
        problem.network.zero_grad()
        engine.backward(problem.of(problem.network), rule)
        return None, gradients(problem.network)

    return step


def heard(what: str, problem: Problem) -> Step:
    """A plain step whose backward is listened to, and norms or Gramian of what was heard."""
    engine = Engine(problem.network)

    def step() -> Found:
        problem.network.zero_grad()
        losses = problem.of(problem.network)
        with engine.listen(losses) as listening:
            losses.sum().backward()
        return getattr(listening.jacobian, what)(), gradients(problem.network)

    return step


def read_first(what: str, problem: Problem) -> Step:
    """The same without listening: a Jacobian, and then a plain backward."""
    engine = Engine(problem.network)

    def step() -> Found:
        problem.network.zero_grad()
        losses = problem.of(problem.network)
        found = getattr(engine.jacobian(losses, retain_graph=True), what)()
        losses.sum().backward()
        return found, gradients(problem.network)

    return step


def loop_rows(problem: Problem) -> Rows:
    """Rows by one backward each, over one graph."""
    leaves = _trained(problem.network)

    def rows() -> dict[str, Tensor]:
        each = zip(*_each(problem, list(leaves.values())), strict=True)
        return dict(zip(leaves, map(torch.stack, each), strict=True))

    return rows


def loop_clipped(problem: Problem) -> Step:
    """Rows by one backward each, clipped and added one by one: no more than one is held."""
    leaves = list(_trained(problem.network).values())

    def step() -> Found:
        totals = [torch.zeros_like(p) for p in leaves]
        for row in _each(problem, leaves):
            norm = torch.stack(torch._foreach_norm(row)).norm()
            torch._foreach_add_(totals, row, alpha=float((MAX_NORM / norm).clamp(max=1.0)))
        for p, total in zip(leaves, totals, strict=True):
            p.grad = total
        return None, gradients(problem.network)

    return step


def vmap_rows(problem: Problem) -> Rows:
    """Rows by `torch.func`: the gradient of one pose, over all of them at once."""
    network = problem.network
    values = {name: p.detach() for name, p in _trained(network).items()}

    def loss(values: dict[str, Tensor], *pose: Tensor) -> Tensor:
        def called(*args: Any, **more: Any) -> Any:
            return functional_call(network, values, args, more)

        return problem.losses(called, *(x.unsqueeze(0) for x in pose)).squeeze(0)

    dims = (None, *(0 for _ in problem.inputs))
    randomness = "different" if problem.is_random else "error"
    rows_of = vmap(grad(loss), in_dims=dims, randomness=randomness)

    def rows() -> dict[str, Tensor]:
        found: dict[str, Tensor] = rows_of(values, *problem.inputs)
        return found

    return rows


def of_rows(rows: Callable[[Problem], Rows], end: str, problem: Problem) -> Step:
    """What a user of rows writes next, to come to a task's end."""
    rows_of, leaves = rows(problem), _trained(problem.network)

    def step() -> Found:
        flat = {name: r.flatten(1) for name, r in rows_of().items()}
        statistic, weights = _ENDS[end](problem, list(flat.values()))
        if weights is not None:
            for name, r in flat.items():
                leaves[name].grad = (weights @ r).view_as(leaves[name])
        return statistic, gradients(problem.network)

    return step


def _norms(problem: Problem, rows: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return torch.stack([r.norm(dim=1) for r in rows]).norm(dim=0), None


def _clipped(problem: Problem, rows: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    norms, _ = _norms(problem, rows)
    assert norms is not None
    return None, (MAX_NORM / norms).clamp(max=1.0)


def _products(problem: Problem, rows: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    gramian = problem.weights.new_zeros(problem.m, problem.m)
    for r in rows:
        gramian.addmm_(r, r.T)
    return gramian, problem.weights


_ENDS = {"norms": _norms, "clip": _clipped, "gramian": _products}


def _each(problem: Problem, leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    losses = problem.of(problem.network)
    for i, loss in enumerate(losses):
        kept = i < len(losses) - 1
        row = torch.autograd.grad(loss, leaves, retain_graph=kept, allow_unused=True)
        yield [torch.zeros_like(p) if r is None else r for p, r in zip(leaves, row, strict=True)]


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}
