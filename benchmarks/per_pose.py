"""What others do for gradients of single examples, in as few lines as each allows.

A way is bound to a network once and then called as `step(inputs, weights)`, where
`network(*inputs)` gives one number an example, `[m, 1]`. It runs the forward too. For the task
`gramian` it returns the Gramian of the rows and their sum under `weights`; for `rows` the rows
themselves, `[m, ...]` for each parameter; for `matrix` these as views of one matrix `[m, n]`. All
are exact: they differ in time and memory only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.exact import Named
from benchmarks.opacus_hooks import hooked
from posegrad import Engine

__all__ = ["PLAIN", "TASKS", "Bind", "Found", "Method", "missing", "plain", "posegrad"]

Inputs = Sequence[Tensor]
Found = tuple[Tensor | None, Named]
Step = Callable[[Inputs, Tensor], Found]
Bind = Callable[[nn.Module], Step]


def plain(network: nn.Module) -> Step:
    """Forward and backward of the summed output: the unit. No Gramian comes of it."""
    parameters = dict(network.named_parameters())

    def step(inputs: Inputs, _: Tensor) -> Found:
        total = network(*inputs).sum()
        return None, _named(parameters, torch.autograd.grad(total, list(parameters.values())))

    return step


def posegrad(network: nn.Module) -> Step:
    """The Gramian and the weighted gradient from one Jacobian in factors."""
    engine = Engine(network)

    def step(inputs: Inputs, weights: Tensor) -> Found:
        J = engine.jacobian(network(*inputs).squeeze(1))
        return J.gramian(), J.combine(weights)

    return step


def posegrad_rows(network: nn.Module) -> Step:
    """The rows of each parameter."""
    engine = Engine(network)

    def step(inputs: Inputs, _: Tensor) -> Found:
        J = engine.jacobian(network(*inputs).squeeze(1))
        return None, {name: J.block(name) for name in J.blocks}

    return step


def posegrad_matrix(network: nn.Module) -> Step:
    """The Jacobian in one matrix, `[m, n]`."""
    engine = Engine(network)
    parameters = dict(network.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def step(inputs: Inputs, _: Tensor) -> Found:
        matrix = engine.jacobian(network(*inputs).squeeze(1)).matrix()
        return None, _named(parameters, matrix.split(sizes, dim=1))

    return step


def joined(rows: Bind, network: nn.Module) -> Step:
    """One matrix `[m, n]` from rows: what a user of rows writes next."""
    rows_of = rows(network)
    sizes = [p.numel() for p in network.parameters()]

    def step(inputs: Inputs, weights: Tensor) -> Found:
        rows = rows_of(inputs, weights)[1]
        matrix = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
        return None, _named(rows, matrix.split(sizes, dim=1))

    return step


def torchjd(batch_dim: int | None, network: nn.Module) -> Step:
    """TorchJD's Gramian, then a backward under the weights.

    The engine is given each layer once. `Engine(network)` hooks a module that two others hold
    twice, and counts it twice: SchNet's filter networks, an error of 14 % of the Gramian.
    """
    from torchjd.autogram import Engine

    engine = Engine(*_owners(network, set()), batch_dim=batch_dim)
    parameters = dict(network.named_parameters())

    def step(inputs: Inputs, weights: Tensor) -> Found:
        y = network(*inputs).squeeze(1)
        gramian = engine.compute_gramian(y)
        gradients = torch.autograd.grad(y, list(parameters.values()), weights)
        return gramian, _named(parameters, gradients)

    return step


def vmap_rows(network: nn.Module) -> Step:
    """`torch.func`: the gradient of one example, over all of them at once."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def score(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        one = tuple(x.unsqueeze(0) for x in example)
        y: Tensor = functional_call(network, parameters, one)
        return y.squeeze()

    def step(inputs: Inputs, _: Tensor) -> Found:
        dims = (None, *(0 for _ in inputs))
        return None, vmap(grad(score), in_dims=dims)(parameters, *inputs)

    return step


def opacus_rows(network: nn.Module) -> Step:
    """Opacus's hooks leave the rows on the parameters; nothing stays there."""
    wrapped = hooked(network)

    def step(inputs: Inputs, _: Tensor) -> Found:
        wrapped(*inputs).sum().backward()
        return None, {name: _taken(parameter) for name, parameter in network.named_parameters()}

    return step


def autograd_rows(network: nn.Module) -> Step:
    """One backward for each example, over one graph."""
    parameters = dict(network.named_parameters())

    def step(inputs: Inputs, _: Tensor) -> Found:
        y = network(*inputs).squeeze(1)
        leaves, last = list(parameters.values()), len(y) - 1
        rows = [torch.autograd.grad(y[i], leaves, retain_graph=i < last) for i in range(len(y))]
        return None, _named(parameters, [torch.stack(r) for r in zip(*rows, strict=True)])

    return step


def of_rows(rows: Bind, network: nn.Module) -> Step:
    """Gramian and weighted gradient from rows: what a user of rows writes next."""
    rows_of = rows(network)

    def step(inputs: Inputs, weights: Tensor) -> Found:
        rows = rows_of(inputs, weights)[1]
        flat = {name: r.flatten(1) for name, r in rows.items()}
        gramian = weights.new_zeros(len(weights), len(weights))
        for r in flat.values():
            gramian.addmm_(r, r.T)
        return gramian, {n: (weights @ r).view(rows[n].shape[1:]) for n, r in flat.items()}

    return step


@dataclass(frozen=True)
class Method:
    """A way of doing a task.

    Attributes:
        bind: Makes its step for a network, which nothing else may use.
        package: What it needs beside torch and posegrad.
        unfit: Why it is not run on a kind of case.
    """

    bind: Bind
    package: str | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)


PLAIN = "plain"
_ONE_SIZE = {"ragged": "poses differ in size"}
_ONE_ROW = {"ragged": "a row an atom, not a pose"}
_NO_BATCH = {"ragged": "no dimension counts poses"}
_LOOP = {"dense": "not run: m backwards"}

TASKS: dict[str, dict[str, Method]] = {
    "gramian": {
        "posegrad": Method(posegrad),
        "TorchJD, batch_dim=0": Method(partial(torchjd, 0), "torchjd", _NO_BATCH),
        "TorchJD, batch_dim=None": Method(partial(torchjd, None), "torchjd"),
        "vmap(grad)": Method(partial(of_rows, vmap_rows), None, _ONE_SIZE),
        "Opacus hooks": Method(partial(of_rows, opacus_rows), "opacus", _ONE_ROW),
        "rows by autograd.grad": Method(partial(of_rows, autograd_rows), None, _LOOP),
    },
    "rows": {
        "posegrad": Method(posegrad_rows),
        "vmap(grad)": Method(vmap_rows, None, _ONE_SIZE),
        "Opacus hooks": Method(opacus_rows, "opacus", _ONE_ROW),
        "rows by autograd.grad": Method(autograd_rows, None, _LOOP),
    },
    "matrix": {
        "posegrad": Method(posegrad_matrix),
        "vmap(grad)": Method(partial(joined, vmap_rows), None, _ONE_SIZE),
        "Opacus hooks": Method(partial(joined, opacus_rows), "opacus", _ONE_ROW),
        "rows by autograd.grad": Method(partial(joined, autograd_rows), None, _LOOP),
    },
}
"""What is asked for, and the ways to it."""

REQUIREMENTS = {"torchjd": "torchjd>=0.18", "opacus": "opacus>=1.6"}


def missing() -> dict[str, str]:
    """The peers that are not installed, and the command that does."""
    return {
        package: f"pip install '{requirement}'"
        for package, requirement in REQUIREMENTS.items()
        if find_spec(package) is None
    }


def _named(parameters: Named, tensors: Sequence[Tensor]) -> Named:
    return dict(zip(parameters, tensors, strict=True))


def _taken(parameter: Any) -> Tensor:
    rows: Tensor = parameter.grad_sample
    parameter.grad_sample = parameter.grad = None
    return rows


def _owners(module: nn.Module, seen: set[nn.Module]) -> list[nn.Module]:
    """The modules that TorchJD hooks, each once: the first on each path with own parameters."""
    if module in seen:
        return []
    seen.add(module)
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return [module]
    return [owner for child in module.children() for owner in _owners(child, seen)]
