"""Plain autograd: what every cleverness has to agree with, and leave alone. Imports no engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["deposited", "gramian", "product", "rows", "trainable", "untouched"]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters a Jacobian has columns for, each once, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rows(output: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """J `[M, n]`, one backward for each number of the output; the graph is kept."""
    sources = list(parameters.values())
    matrix = []
    for number in output.reshape(-1).unbind():
        found = torch.autograd.grad(number, sources, retain_graph=True, allow_unused=True)
        matrix.append(torch.cat([_dense(g, p) for g, p in zip(found, sources, strict=True)]))
    return torch.stack(matrix)


def gramian(matrix: Tensor, shape: torch.Size) -> Tensor:
    """J Jᵀ of shape `shape + reversed(shape)`."""
    order = [*range(len(shape)), *reversed(range(len(shape), 2 * len(shape)))]
    return (matrix @ matrix.T).reshape([*shape, *shape]).permute(order)


def product(weights: Tensor, matrix: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """wᵀJ, shaped and named like the parameters."""
    flat = (weights.reshape(-1) @ matrix).split([p.numel() for p in parameters.values()])
    return {
        name: part.reshape(p.shape).to(p.dtype)
        for (name, p), part in zip(parameters.items(), flat, strict=True)
    }


def deposited(
    output: Tensor, weights: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """What a backward leaves in `.grad`, dense; the graph is kept, `.grad` is None again."""
    output.backward(weights, retain_graph=True)
    found = {name: None if p.grad is None else p.grad.to_dense() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


@contextmanager
def untouched(model: nn.Module, mark: float | None = 7.0) -> Iterator[None]:
    """What happens inside leaves every `.grad` as it finds it: full of a number, or None."""
    parameters = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
    for p in parameters.values():
        p.grad = None if mark is None else torch.full_like(p, mark)
    yield
    for name, p in parameters.items():
        if mark is None:
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert bool((p.grad == mark).all()), name


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter).reshape(-1)
    return gradient.to_dense().reshape(-1)
