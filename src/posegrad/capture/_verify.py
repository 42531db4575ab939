"""Never silently wrong: a Jacobian is compared with one plain backward."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from posegrad.capture._compat import leaf_hooks_off
from posegrad.capture._trial import Subject
from posegrad.capture._vjp import dense
from posegrad.jacobian import Block, Part, Weighted

__all__ = ["disagreeing"]

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.float16: 6e-2,
    torch.bfloat16: 1e-1,
}


def disagreeing(
    subject: Subject,
    parameters: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[Part]],
    doubtful: Collection[str],
) -> tuple[frozenset[str], frozenset[str]]:
    r"""The parameters whose :math:`w^\top J` is not what autograd gives, for one random w.

    Returns:
        Of the doubtful ones those that disagree, and those that were compared at all: of nan and
        infinite gradients nothing can be said.

    The weights have mixed signs and sizes: with ones, rows given to the wrong pose would still sum
    to the right total. The tolerance is relative to the larger of the two results and of the
    result with the signs of w dropped, so that a cancellation is not taken for an error; and below
    some rounding errors of the whole gradient nothing is an error, for there are parameters whose
    gradient is zero but for rounding (the bias of attention's keys).
    """
    output = subject.output
    weights = torch.randn(output.shape, generator=subject.generator, dtype=torch.float64)
    weights = weights.to(output.device, output.dtype)
    signed, absolute = Weighted(weights.reshape(-1)), Weighted(weights.abs().reshape(-1))
    leaves = list(parameters.values())
    with leaf_hooks_off(leaves):
        expected = torch.autograd.grad(
            output, leaves, weights, retain_graph=True, allow_unused=True
        )
    floor = 64 * torch.finfo(output.dtype).eps * _size(expected)
    wrong, sure = set(), set()
    dtypes = {output.dtype, *(b.dtype for own in parts.values() for p in own for b in _tensors(p))}
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        if name not in doubtful:
            continue
        tolerance = max(_TOLERANCE.get(d, 2e-3) for d in dtypes | {parameter.dtype})
        block = Block.of(parameter, output.numel(), parts[name])
        found = block.combine(signed)
        reference = torch.zeros_like(found) if gradient is None else dense(gradient)
        if not bool(found.isfinite().all()) and not bool(reference.isfinite().all()):
            continue
        sure.add(name)
        error = (found - reference).double().norm()
        if error <= floor + tolerance * max(found.double().norm(), reference.double().norm()):
            continue
        scale = block.combine(absolute).double().norm()
        if not error <= tolerance * scale:
            wrong.add(name)
    return frozenset(wrong), frozenset(sure)


def _size(gradients: Sequence[Tensor | None]) -> float:
    """The norm of a whole gradient."""
    norms = [dense(g).double().norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _tensors(part: Part) -> Sequence[Tensor]:
    return getattr(part, "cotangents", ())
