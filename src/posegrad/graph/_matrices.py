"""How products and systems of matrices move the dimension of poses; see `_moves.py`."""

import torch

from posegrad.graph._axis import Axis, Facts, Rule
from posegrad.graph._moves import aligned, first_alone

__all__ = [
    "between_two",
    "distances",
    "matrices",
    "outer",
    "plus_vector",
    "product",
    "reflected",
    "rows_alone",
    "summed_products",
    "system",
    "system_or_vectors",
    "times_vector",
]


def product(left: int, right: int) -> Rule:
    """A matrix product: poses lie in rows of the left operand or in columns of the right."""

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        if arg not in (left, right):
            return aligned(facts, arg, axis, out, inside)  # the summand of addmm
        batched = axis.dim < len(out) - 2
        own = len(out) - (2 if arg == left else 1)
        return axis if batched or axis.dim == own else None

    return rule


def matrices(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """An operator on one matrix, or several as long, `[..., n, k]`, each by itself."""
    apart = axis.dim < len(inside) - 2 and axis.dim < len(out)
    return axis if apart and inside[axis.dim] == out[axis.dim] else None


def system(right_side: int) -> Rule:
    """Systems of linear equations, whose right side is that argument, in batches that broadcast.

    Columns of the right side keep apart, or its rows if the operator was told that the matrix
    stands on the right.
    """

    def rule(
        facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
    ) -> Axis | None:
        own = len(out) - (2 if False in facts else 1)
        batched = axis.dim < len(out) - 2
        apart = batched or (arg == right_side and axis.dim == own)
        return aligned(facts, arg, axis, out, inside) if apart else None

    return rule


def system_or_vectors(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`linalg.solve`: its right sides are matrices or vectors; their shape does not tell which."""
    if arg == 0 and len(inside) == len(out) + 1:  # vectors
        apart = axis.dim < len(out) - 1 and inside[axis.dim] == out[axis.dim]
        return axis if apart else None
    batched = axis.dim < len(out) - 2
    return aligned(facts, arg, axis, out, inside) if batched else None


def reflected(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`ormqr`: a product with reflections, which are two arguments."""
    if arg == 2:
        return system(2)(facts, arg, axis, out, inside)
    return matrices(facts, arg, axis, out, inside)


def distances(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """From `[..., n, d]` and `[..., k, d]` to `[..., n, k]`."""
    if axis.dim < len(out) - 2:
        kept = len(inside) == len(out) and inside[axis.dim] == out[axis.dim]
        return axis if kept else None
    own = axis.dim - (len(out) - 2) == arg
    return axis._replace(dim=len(inside) - 2) if own else None


def times_vector(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A matrix times a vector."""
    return axis if arg == 0 else None


def plus_vector(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A matrix times a vector, added to another."""
    return aligned(facts, arg, axis, out, inside) if arg == 0 else axis if arg == 1 else None


def rows_alone(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """A matrix `[R, d]` whose rows are multiplied by this weight or by that."""
    matrices = len(out) == len(inside) == 2
    return axis if arg == 0 and matrices and axis.dim == 0 and inside[0] == out[0] else None


def outer(facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size) -> Axis | None:
    """The outer product of two vectors, added to a matrix."""
    if arg == 0:
        return aligned(facts, arg, axis, out, inside)
    return axis._replace(dim=0) if axis.dim == arg - 1 else None


def summed_products(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """Products of a batch of matrices, added up, and to a matrix."""
    if arg == 0:
        return aligned(facts, arg, axis, out, inside)
    return axis._replace(dim=arg) if axis.dim == arg - 1 else None


def between_two(
    facts: Facts, arg: int, axis: Axis, out: torch.Size, inside: torch.Size
) -> Axis | None:
    """`F.bilinear`: from `[m, d]` and `[m, e]`, by a weight `[p, d, e]`, to `[m, p]`."""
    if tuple(map(tuple, facts)) != ((1, 3), (0,), (1, 2), (2, 3)):
        return None
    if arg == 1:
        return axis._replace(dim=0) if axis.dim == 1 else None
    return first_alone(facts, arg, axis, out, inside)
