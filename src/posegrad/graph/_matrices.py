"""How products and systems of matrices move the dimension of poses; see `_moves.py`."""

import torch

from posegrad.graph._layouts import Facts, Move
from posegrad.graph._moves import aligned, first_alone
from posegrad.jacobian import Layout

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


def product(left: int, right: int) -> Move:
    """A matrix product: poses lie in rows of the left operand or in columns of the right."""

    def move(
        facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
    ) -> Layout | None:
        if arg not in (left, right):
            return aligned(facts, arg, layout, out, inside)  # the summand of addmm
        batched = layout.dim < len(out) - 2
        own = len(out) - (2 if arg == left else 1)
        return layout if batched or layout.dim == own else None

    return move


def matrices(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """An operator on a batch of matrices `[..., n, k]`, on each by itself."""
    apart = layout.dim < len(inside) - 2 and layout.dim < len(out)
    return layout if apart and inside[layout.dim] == out[layout.dim] else None


def system(right_side: int) -> Move:
    """Systems of linear equations, in batches that broadcast; one argument is their right side.

    Columns of the right side keep apart, or its rows if the operator was told that the matrix
    stands on the right.
    """

    def move(
        facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
    ) -> Layout | None:
        own = len(out) - (2 if False in facts else 1)
        batched = layout.dim < len(out) - 2
        apart = batched or (arg == right_side and layout.dim == own)
        return aligned(facts, arg, layout, out, inside) if apart else None

    return move


def system_or_vectors(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`linalg.solve`: its right sides are matrices or vectors; their shape does not tell which."""
    if arg == 0 and len(inside) == len(out) + 1:  # vectors
        apart = layout.dim < len(out) - 1 and inside[layout.dim] == out[layout.dim]
        return layout if apart else None
    batched = layout.dim < len(out) - 2
    return aligned(facts, arg, layout, out, inside) if batched else None


def reflected(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`ormqr`: a product with reflections, which two arguments describe."""
    if arg == 2:
        return system(2)(facts, arg, layout, out, inside)
    return matrices(facts, arg, layout, out, inside)


def distances(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """From `[..., n, d]` and `[..., k, d]` to `[..., n, k]`."""
    if layout.dim < len(out) - 2:
        kept = len(inside) == len(out) and inside[layout.dim] == out[layout.dim]
        return layout if kept else None
    own = layout.dim - (len(out) - 2) == arg
    return layout.moved(len(inside) - 2) if own else None


def times_vector(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A matrix times a vector."""
    return layout if arg == 0 else None


def plus_vector(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A matrix times a vector, added to another vector."""
    return aligned(facts, arg, layout, out, inside) if arg == 0 else layout if arg == 1 else None


def rows_alone(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """A matrix `[R, d]`, each row of which is multiplied by one of several weights."""
    matrices = len(out) == len(inside) == 2
    return layout if arg == 0 and matrices and layout.dim == 0 and inside[0] == out[0] else None


def outer(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The outer product of two vectors, added to a matrix."""
    if arg == 0:
        return aligned(facts, arg, layout, out, inside)
    return layout.moved(0) if layout.dim == arg - 1 else None


def summed_products(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """The sum of a batch of matrix products, added to a matrix."""
    if arg == 0:
        return aligned(facts, arg, layout, out, inside)
    return layout.moved(arg) if layout.dim == arg - 1 else None


def between_two(
    facts: Facts, arg: int, layout: Layout, out: torch.Size, inside: torch.Size
) -> Layout | None:
    """`F.bilinear`: from `[m, d]` and `[m, e]`, by a weight `[p, d, e]`, to `[m, p]`."""
    if tuple(map(tuple, facts)) != ((1, 3), (0,), (1, 2), (2, 3)):
        return None
    if arg == 1:
        return layout.moved(0) if layout.dim == 1 else None
    return first_alone(facts, arg, layout, out, inside)
