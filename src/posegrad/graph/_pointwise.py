r"""Operators that act element by element, and their derivatives.

The Jacobian of such an operator is diagonal, so its backward is a product with the derivative, and
given ones it returns the derivative itself: no formula has to be written twice. Two kinds of zero
have to be told apart. Where the derivative happens to be zero, an infinite cotangent becomes nan;
where an operator picks something else, as `torch.where` does, nothing flows, whatever the cotangent
is.
"""

import torch
from torch import Tensor

from posegrad._restoring import no_autocast, no_graph
from posegrad._torch import device_of, shape_of
from posegrad.graph._alone import apply_node
from posegrad.graph._read import Entry, Operator, Reader, aligned_to
from posegrad.jacobian import ClosedForm, Factor
from posegrad.jacobian.layers import Elementwise

__all__ = ["pointwise"]


def pointwise(argument: int) -> Reader:
    """How the form of an argument is read.

    Args:
        argument: Its number; the operator has one output and computes it element by element.
    """

    def reader(op: Operator, entry: Entry) -> ClosedForm | None:
        aligned = aligned_to(op, entry)
        if aligned is None or len(shape_of(op.node)) > 1:
            return None
        derivative = _answer(op, argument, 1.0)
        if derivative is None or derivative.is_complex() or derivative.shape != op.sizes:
            return None  # a sum over elements, as of a loss or of a number that fills a mask
        factor = Factor.of(derivative, entry.name)
        zero = derivative == 0
        if not bool(zero.any()):
            return Elementwise(entry.shape, aligned, factor)
        infinite = _answer(op, argument, torch.inf)
        assert infinite is not None
        stops = zero & (infinite == 0)
        if not bool(stops.any()):
            return Elementwise(entry.shape, aligned, factor)
        return Elementwise(entry.shape, aligned, factor, Factor.of(stops, entry.name))

    return reader


def _answer(op: Operator, argument: int, number: float) -> Tensor | None:
    """What the operator's backward makes of a cotangent that is one number everywhere."""
    with no_graph(), no_autocast():
        cotangent = torch.full(op.sizes, number, dtype=op.dtype, device=device_of(op.node))
        return apply_node(op.node, [cotangent])[argument]
