"""Never silently wrong: a Jacobian is compared with one plain backward."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from posegrad._restoring import leaf_hooks_off
from posegrad.graph._subject import Subject
from posegrad.graph._vjp import dense
from posegrad.jacobian import Block, Part, Purpose, Weights

__all__ = ["Reference"]

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.float16: 6e-2,
    torch.bfloat16: 1e-1,
}

_ROUNDINGS = 8  # how many of autograd's own rounding errors rows may be off by


@final
@dataclass(frozen=True)
class Reference:
    r"""What autograd gives for :math:`w^\top J`, for one random w.

    The weights have mixed signs and sizes: with ones, rows given to the wrong pose would still sum
    to the right total. It is taken before anything else is held, when there is room for it.

    Args:
        weights: w, in the output's shape.
        gradients: By parameter; None where autograd gives none.
    """

    weights: Tensor
    gradients: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, subject: Subject) -> Self:
        """One plain backward; the graph is kept."""
        output, parameters = subject.output, subject.parameters
        weights = torch.randn(
            output.shape, generator=subject.generator, dtype=torch.float64, device="cpu"
        )
        weights = weights.to(output.device, output.dtype)
        return cls(weights, _gradients(subject, parameters, weights))

    def disagreeing(
        self,
        subject: Subject,
        parts: Mapping[str, Sequence[Part]],
        doubtful: Collection[str],
    ) -> tuple[frozenset[str], frozenset[str]]:
        """The parameters whose rows do not add up to it.

        The tolerance is that of the narrowest dtype which the gradient passes. It is relative to
        the largest of the two results and of the result with the signs of w dropped, so that a
        cancellation is not taken for an error. What is below some rounding errors of the whole
        gradient is no error: some parameters have a gradient that is zero but for rounding (the
        bias of attention's keys).

        Args:
            subject: What was differentiated.
            parts: What was read, by parameter.
            doubtful: The parameters to compare.

        Returns:
            Of the doubtful ones those that disagree, and those that were compared at all: of nan
            and infinite gradients nothing can be said.
        """
        registry, parameters = subject.registry, subject.parameters
        flat = self.weights.reshape(-1)
        size = _size(self.gradients.values())
        wrong, sure = set(), set()
        faint: dict[str, Tensor] = {}
        for name in (name for name in parameters if name in doubtful):
            parameter, gradient = parameters[name], self.gradients[name]
            dtypes = registry.dtypes_passed[registry.leaves[id(parameter)]]
            tolerance = max(_TOLERANCE.get(d, 2e-3) for d in dtypes)
            eps = max(torch.finfo(d).eps for d in dtypes)
            floor = 64 * min(eps, torch.finfo(torch.float32).eps) * size
            block = Block.of(parameter, len(flat), parts[name])
            found = block.combine(Weights(flat))
            reference = torch.zeros_like(found) if gradient is None else dense(gradient)
            if not bool(found.isfinite().all()) and not bool(reference.isfinite().all()):
                continue
            sure.add(name)
            error = _norm(found - reference)
            if error <= floor + tolerance * max(_norm(found), _norm(reference)):
                continue
            if not error <= tolerance * _norm(block.combine(Weights(flat.abs()))):
                if error <= eps * size:
                    faint[name] = error
                else:
                    wrong.add(name)
        return frozenset(wrong | self._no_rounding(subject, faint)), frozenset(sure)

    def _no_rounding(self, subject: Subject, errors: Mapping[str, Tensor]) -> set[str]:
        """The parameters whose small error is more than rounding: far above autograd's own.

        A gradient is linear in w, so what the gradients of two parts of w add up to differs from
        that of w by rounding alone.
        """
        if not errors:
            return set()
        sources = {name: subject.parameters[name] for name in errors}
        part = 0.375 * self.weights
        halves = [_gradients(subject, sources, w) for w in (part, self.weights - part)]
        wrong = set()
        for name, error in errors.items():
            one, other, whole = (_or_zero(g[name], error) for g in (*halves, self.gradients))
            if not error <= _ROUNDINGS * _norm(one + other - whole):
                wrong.add(name)
        return wrong


def _gradients(
    subject: Subject, parameters: Mapping[str, Tensor], weights: Tensor
) -> dict[str, Tensor | None]:
    """One plain backward; the graph is kept."""
    leaves = list(parameters.values())
    subject.backwards.add(Purpose.CHECK)
    with leaf_hooks_off(leaves):
        gradients = torch.autograd.grad(
            subject.output,
            leaves,
            weights.clone(),  # a hook may write to it
            retain_graph=True,
            allow_unused=True,
        )
    return dict(zip(parameters, gradients, strict=True))


def _or_zero(gradient: Tensor | None, zero: Tensor) -> Tensor:
    return torch.zeros_like(zero) if gradient is None else dense(gradient)


def _size(gradients: Iterable[Tensor | None]) -> float:
    """The norm of a whole gradient."""
    norms = [_norm(dense(g)) for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = (tensor.abs() if tensor.is_complex() else tensor).double().norm()
    return norm
