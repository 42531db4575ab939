"""Inner products of rows."""

from collections.abc import Callable, Iterable
from math import prod
from typing import final

import torch
from torch import Tensor

from posegrad.jacobian._layout import Layout
from posegrad.jacobian._precision import wide

__all__ = [
    "Products",
    "added",
    "are_kept",
    "as_rows",
    "cancel",
    "crossed",
    "crossed_pairs",
    "crossed_pairs_are_cheaper",
    "generalized",
    "inner_products",
    "is_same",
    "multiplied",
    "pairs_are_cheaper",
    "rows_are_cheaper",
    "squared_norms",
    "squared_sums",
    "summed_pairs",
]

_PANEL = 64  # rows in a panel
_KEPT = 2**20  # products kept beyond two matrices: with many rows they are large


@final
class Products:
    """The products of all rows of two tensors, and of each row with itself.

    A weight and its bias share cotangents; projections of one tensor share their input. These are
    neighbours, so the latest products are kept rather than taken again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._count = 0  # how many products are kept
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        """The products of the rows `[..., p]`, `[R, R']`, in float32 at least."""
        key = first.data_ptr(), second.data_ptr()  # unique while the tensors are held here
        known = self._known.pop(key, None)
        if known is None or not is_same(first, known[0]) or not is_same(second, known[1]):
            alike = key[0] == key[1] and is_same(first, second)
            left = wide(as_rows(first))
            found = inner_products(left) if alike else left @ wide(as_rows(second)).mT
            self._count += found.numel() - (0 if known is None else known[2].numel())
            known = first, second, found
        self._known[key] = known  # as the latest
        while self._count > _KEPT and len(self._known) > 2:
            oldest = self._known.pop(next(iter(self._known)))
            self._count -= oldest[2].numel()
        return known[2]

    def squares(self, tensor: Tensor) -> Tensor:
        """The squared norms of the rows `[..., p]`, `[R]`, in float32 at least."""
        known = self._squares.get(tensor.data_ptr())
        if known is None or not is_same(tensor, known[0]):
            squares = squared_norms(wide(as_rows(tensor)))
            known = self._squares[tensor.data_ptr()] = tensor, squares
        return known[1]


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., p]` as `[R, p]`."""
    *rows, width = tensor.shape
    return tensor if len(rows) == 1 else tensor.reshape(prod(rows), width)


def squared_norms(rows: Tensor) -> Tensor:
    """The squared norms `[M]` of rows `[M, n]`."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def inner_products(rows: Tensor) -> Tensor:
    """The Gramian `[M, M]` of rows `[M, n]`; on a CPU, half of it is copied by symmetry."""
    if rows.device.type == "cpu" and _pays_in_panels(*rows.shape):
        return _by_panels(rows)
    return rows @ rows.mT


def _by_panels(rows: Tensor) -> Tensor:
    """The Gramian of many rows, as of activations: each panel times those before it."""
    gram = rows.new_empty(len(rows), len(rows))
    for i in range(0, len(rows), _PANEL):
        end = min(i + _PANEL, len(rows))
        panel = torch.mm(rows[i:end], rows[:end].mT, out=gram[i:end, :end])
        gram[:i, i:end] = panel[:, :i].mT
    return gram


def _pays_in_panels(rows: int, width: int) -> bool:
    return rows >= 4 * _PANEL and width >= 8 * _PANEL


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices `[..., p, T]` and `[..., T, d]`.

    With T = 1 these are outer products: broadcasting then takes only as long as writing the result.
    The matrix product is a fifth faster at best, and on some processors 2 to 20 times slower.
    """
    return left * right if right.shape[-2] == 1 else left @ right


def added(terms: Iterable[Tensor], device: torch.device) -> Tensor | None:
    """The sum over parameters, in the widest of their dtypes; None if there are none."""
    total: Tensor | None = None
    is_own = False  # may be written to
    for term in terms:
        placed = term if term.device == device else term.to(device)
        if total is None:
            total = placed
        elif is_own and total.dtype == placed.dtype:
            total.add_(placed)
        else:
            total, is_own = total + placed, True
    return total


def generalized(gramian: Tensor, shape: torch.Size) -> Tensor:
    """From a Gramian `[M, M]` to `shape + reversed(shape)`, for an output of that shape."""
    if len(shape) == 1:
        return gramian
    order = [*range(len(shape)), *reversed(range(len(shape), 2 * len(shape)))]
    return gramian.reshape((*shape, *shape)).permute(order)


def crossed(products: Tensor, shape: torch.Size, other: torch.Size) -> Tensor:
    """From products `[M, M']` of rows to `shape + reversed(other)`, for outputs of these shapes."""
    total = products.reshape((*shape, *other))
    order = [*range(len(shape)), *reversed(range(len(shape), total.ndim))]
    return total.permute(order)


def pairs_are_cheaper(
    rows: int, numbers: int, height: int, width: int, *, halved: bool = False
) -> bool:
    """Whether products of R rows cost less than gradients `[height, width]` of M numbers.

    Products take R^2 (d + p) multiplications; gradients take R d p, and their products M^2 d p.
    Each of the M d p numbers of the gradients is also written and read, which takes as long as some
    32 multiplications. But gradients not far larger than their factors are kept, which saves the
    weighted sum its R d p.

    Args:
        rows: R.
        numbers: M.
        height: p.
        width: d.
        halved: Whether the products are those of `inner_products` on a CPU.
    """
    size = height * width
    if rows > numbers and 2 * rows**2 > numbers * size:
        return False  # products would take more memory, too
    pairs = sum(
        rows**2 * side * (2 / 3 if halved and _pays_in_panels(rows, side) else 1)
        for side in (height, width)
    )
    if are_kept(rows, numbers, height, width):
        pairs += rows * size
    return pairs <= (rows + 32 * numbers + numbers**2) * size


def are_kept(rows: int, numbers: int, height: int, width: int) -> bool:
    """Whether gradients `[height, width]` of M numbers are not far larger than their R rows."""
    return numbers * height * width <= 2 * rows * (height + width)


def crossed_pairs_are_cheaper(
    rows: tuple[int, int], numbers: tuple[int, int], height: int, width: int
) -> bool:
    """Whether products of R with R' rows cost less than gradients of M and of M' numbers.

    As `pairs_are_cheaper`, for two Jacobians.
    """
    size, pairs, both = height * width, rows[0] * rows[1], sum(numbers)
    if sum(rows) > both and 2 * pairs > both * size:
        return False  # products would take more memory, too
    return pairs * (height + width) <= (sum(rows) + 32 * both + numbers[0] * numbers[1]) * size


def rows_are_cheaper(rows: int, numbers: int, directions: int) -> bool:
    """Whether products of M gradients with k vectors cost less by gradients than by R rows.

    By rows: k R d p multiplications. By gradients: R d p to form them, k M d p for the products,
    and as many as 32 M d p to write and read the gradients.
    """
    return directions * rows > rows + (32 + directions) * numbers


def summed_pairs(
    pairs: Tensor, owners: Layout, *, alike: bool, in_double: Callable[[], Tensor]
) -> Tensor | None:
    """Sums the products `[R, R]` of rows over their owners, `[m, m]`.

    Args:
        pairs: The products.
        owners: The owner of each row.
        alike: Whether the rows were multiplied with themselves.
        in_double: Computes the products in float64, for narrower rows that cancel.

    Returns:
        None if the rows of an owner cancel in float64 already, so that this sum loses digits that a
        sum of rows keeps.
    """
    total = owners.sum(owners.sum(pairs).mT).mT
    if not alike or len(pairs) == len(total):
        return total
    sizes = owners.sum(owners.sum(pairs.abs()).mT)
    if not bool(cancel(sizes.diagonal(), total.diagonal()).any()):
        return total
    if pairs.dtype == torch.float64:
        return None
    return owners.sum(owners.sum(in_double()).mT).mT.to(pairs.dtype)


def crossed_pairs(
    pairs: Tensor,
    layouts: tuple[Layout, Layout],
    lengths: Callable[[], tuple[Tensor, Tensor] | None],
    in_double: Callable[[], Tensor],
) -> Tensor | None:
    """Sums the products `[R, R']` of two Jacobians' rows over their owners, `[m, m']`.

    Args:
        pairs: The products.
        layouts: The owners of both Jacobians' rows.
        lengths: The norms of the owners' gradients, `[m]` and `[m']`; None if unknown.
        in_double: Computes the products in float64, for narrower rows that cancel.

    Returns:
        None if rows cancel in float64 already, so that sums of products lose digits that sums of
        rows keep; or if the norms, which tell, are unknown.
    """
    first, second = layouts

    def added(products: Tensor) -> Tensor:
        return second.sum(first.sum(products).mT).mT

    total = added(pairs)
    if total.shape == pairs.shape:
        return total
    found = lengths()
    if found is None:
        return None
    if not bool(cancel(added(pairs.abs()), torch.outer(*found)).any()):
        return total
    return None if pairs.dtype == torch.float64 else added(in_double()).to(pairs.dtype)


def squared_sums(a: Tensor, b: Tensor) -> Tensor | None:
    r"""The squared norms :math:`\lVert \sum_r b_r a_r^\top \rVert^2` of k poses.

    They are the sums of :math:`(A A^\top) \circ (B B^\top)`. Where rows cancel, they are taken in
    float64, which keeps more digits than sums of narrower rows.

    Args:
        a: `[k, ..., T, d]`.
        b: `[k, ..., T, p]`.

    Returns:
        `[k]`; None if float64 rows cancel.
    """
    pairs = ((a @ a.mT) * (b @ b.mT)).flatten(1)
    squares = pairs.sum(1)
    unsure = cancel(pairs.abs().sum(1), squares)
    if not bool(unsure.any()):
        return squares
    if squares.dtype == torch.float64:
        return None
    a, b = a[unsure].double(), b[unsure].double()
    exact = ((a @ a.mT) * (b @ b.mT)).flatten(1).sum(1)
    return squares.index_put_((unsure,), exact.clamp(min=0).to(squares.dtype))


def cancel(sizes: Tensor, squares: Tensor) -> Tensor:
    """Which squared norms are far smaller than the terms they sum up."""
    return sizes.mul(torch.finfo(sizes.dtype).eps ** 0.25) > squares


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors at the same address have the same numbers."""
    alike = first.shape == second.shape and first.stride() == second.stride()
    alike = alike and first.dtype == second.dtype and first.device == second.device
    return alike and first.is_neg() == second.is_neg()  # imaginary parts, conjugated
