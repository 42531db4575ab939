"""Poses along unusual dimensions, several entries a pose: followed where the operator allows."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, as everybody calls it

from tests.operators.network import FEATURES, read

M = 3  # poses

Pattern = tuple[int, int]
"""How often all poses come behind each other along a dimension, and how many entries each has."""

PATTERNS: tuple[Pattern, ...] = ((1, 1), (2, 2), (1, 4))


class Row(NamedTuple):
    """A function of a tensor with poses along one dimension.

    Args:
        others: The sizes of the other dimensions.
        dim: That of poses.
        function: It also takes the size of this dimension.
        out_dim: Where poses lie in what it returns.
        followed: The patterns for which that follows from the structure.
        copies: How many times as often all poses come there.
        step: What the size of the dimension must be a multiple of.
    """

    others: tuple[int, ...]
    dim: int
    function: Callable[[Tensor, int], Tensor]
    out_dim: int
    followed: tuple[Pattern, ...] = PATTERNS
    copies: int = 1
    step: int = 1


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _matrix(*batch: int) -> Tensor:
    return _drawn(*batch, 3, 3) + 5 * torch.eye(3, dtype=torch.float64)


def _grid(count: int) -> Tensor:
    return torch.tanh(_drawn(2, 4, count, 2))


IN_TWOS = tuple((outer, inner) for outer, inner in PATTERNS if inner % 2 == 0)
IN_FOURS = ((1, 4),)

ROWS: dict[str, Row] = {
    # Convolutions
    "depthwise convolution": Row((2, 5), 1, lambda x, c: F.conv1d(x, _drawn(c, 1, 3), groups=c), 1),
    "depthwise convolution, more channels": Row(
        (2, 5), 1, lambda x, c: F.conv1d(x, _drawn(2 * c, 1, 3), groups=c), 1
    ),
    "convolution in groups of two": Row(
        (2, 5), 1, lambda x, c: F.conv1d(x, _drawn(c, 2, 3), groups=c // 2), 1, IN_TWOS, step=2
    ),
    "transposed convolution in groups of two": Row(
        (2, 5),
        1,
        lambda x, c: F.conv_transpose1d(x, _drawn(c, 2, 3), groups=c // 2),
        1,
        IN_TWOS,
        step=2,
    ),
    "convolution of all channels": Row((2, 5), 1, lambda x, c: F.conv1d(x, _drawn(c, c, 3)), 1, ()),
    "kernel of one": Row((2, 2, 4), 2, lambda x, c: F.conv2d(x, _drawn(3, 2, 1, 3)), 2),
    "kernel of one, a stride": Row(
        (2, 2), 2, lambda x, c: F.conv1d(F.pad(x, (0, c)), _drawn(3, 2, 1), stride=2), 2, ()
    ),
    "kernel of three": Row((2, 2), 2, lambda x, c: F.conv1d(x, _drawn(3, 2, 3), padding=1), 2, ()),
    "weights of a convolution": Row((2, 3), 0, lambda w, c: F.conv1d(_drawn(4, 2, 6), w), 1),
    "weights of a convolution in groups": Row(
        (1, 3), 0, lambda w, c: F.conv1d(_drawn(4, c, 6), w, groups=c), 1
    ),
    "weights of a transposed convolution": Row(
        (2, 3), 1, lambda w, c: F.conv_transpose1d(_drawn(4, 2, 6), w), 1
    ),
    "weights of a transposed convolution in two groups": Row(
        (4, 3), 1, lambda w, c: F.conv_transpose1d(_drawn(4, 4, 6), w, groups=2), 1, copies=2
    ),
    "weights of a transposed convolution, depthwise": Row(
        (1, 3), 0, lambda w, c: F.conv_transpose1d(_drawn(4, c, 6), w, groups=c), 1
    ),
    "biases of a convolution": Row(
        (), 0, lambda b, c: F.conv1d(_drawn(4, 2, 6), _drawn(c, 2, 3), b), 1
    ),
    # Statistics
    "group norm in groups of two": Row(
        (2, 5), 1, lambda x, c: F.group_norm(x, c // 2), 1, IN_TWOS, step=2
    ),
    "scale of a group norm": Row((), 0, lambda w, c: F.group_norm(_drawn(2, c, 5), 1, w), 1),
    "scale of a layer norm": Row((), 0, lambda w, c: F.layer_norm(_drawn(2, 5, c), (c,), w), 2),
    "scale of a layer norm over two": Row(
        (5,), 1, lambda w, c: F.layer_norm(_drawn(2, 5, c), (5, c), w), 2
    ),
    "scale of an RMS norm": Row((), 0, lambda w, c: F.rms_norm(_drawn(2, 5, c), (c,), w), 2),
    "scale of an instance norm": Row(
        (), 0, lambda w, c: F.instance_norm(_drawn(2, c, 5), weight=w), 1
    ),
    "batch norm in evaluation": Row(
        (2, 3), 2, lambda x, c: F.batch_norm(x, _drawn(3), _drawn(3).square()), 2
    ),
    # Images
    "adaptive pool": Row((2, 2, 4), 2, lambda x, c: F.adaptive_avg_pool2d(x, (None, 2)), 2),
    "adaptive pool to a size": Row((2, 2), 2, lambda x, c: F.adaptive_avg_pool1d(x, M), 2, ()),
    "pool": Row((2, 2, 4), 2, lambda x, c: F.max_pool2d(x, (1, 2)), 2),
    "pool that overlaps": Row((2, 2), 2, lambda x, c: F.avg_pool1d(x, 3, 1, 1), 2, ()),
    "padded beside poses": Row((2, 2, 4), 2, lambda x, c: F.pad(x, (1, 1, 0, 0), "circular"), 2),
    "reflected beside poses": Row((2, 2, 4), 2, lambda x, c: F.pad(x, (1, 1, 0, 0), "reflect"), 2),
    "pixel shuffle, channels": Row(
        (3, 3), 0, lambda x, c: F.pixel_shuffle(x, 2), 0, IN_FOURS, step=4
    ),
    "pixel shuffle, rows": Row((4, 3), 1, lambda x, c: F.pixel_shuffle(x, 2), 1),
    "pixel unshuffle, channels": Row((4, 4), 0, lambda x, c: F.pixel_unshuffle(x, 2), 0),
    "pixel unshuffle, rows": Row(
        (2, 4), 1, lambda x, c: F.pixel_unshuffle(x, 2), 1, IN_TWOS, step=2
    ),
    "channel shuffle, rows": Row((2, 4, 2), 2, lambda x, c: F.channel_shuffle(x, 2), 2),
    "channel shuffle of volumes": Row((2, 2, 2, 2), 1, lambda x, c: F.channel_shuffle(x, 3), 1, ()),
    "grid_sample, channels": Row(
        (2, 3, 3), 1, lambda x, c: F.grid_sample(x, _grid(5), align_corners=False), 1
    ),
    "grid_sample, places": Row(
        (2, 4, 2), 2, lambda x, c: F.grid_sample(_drawn(2, 3, 5, 5), x, align_corners=False), 3
    ),
    # The same numbers elsewhere
    "repeat": Row((4,), 0, lambda x, c: x.repeat(2, 1), 0, copies=2),
    "rot90": Row((2, 4), 1, lambda x, c: x.rot90(1, (1, 2)), 2),
    "rot90 back": Row((2, 4), 2, lambda x, c: x.rot90(-1, (1, 2)), 1),
    "slice of all": Row((4,), 0, lambda x, c: torch.narrow(x, 0, 0, c) * _drawn(4), 0),
    "upper diagonal": Row((20,), 0, lambda x, c: x.diagonal(1), 0),
    "lower diagonal": Row((20,), 1, lambda x, c: x.diagonal(-1), 0),
    # Matrices
    "solve_triangular, columns": Row(
        (3,), 1, lambda b, c: torch.linalg.solve_triangular(_matrix(), b, upper=True), 1
    ),
    "solve_triangular on the right, rows": Row(
        (3,), 0, lambda b, c: torch.linalg.solve_triangular(_matrix(), b, upper=True, left=False), 0
    ),
    "solve_triangular, rows": Row(
        (4,),
        0,
        lambda b, c: torch.linalg.solve_triangular(
            _drawn(c, c).triu() + 3 * torch.eye(c, dtype=torch.float64), b, upper=True
        ),
        0,
        (),
    ),
    "lu_solve, columns": Row(
        (2, 3), 2, lambda b, c: torch.linalg.lu_solve(*torch.linalg.lu_factor(_matrix()), b), 2
    ),
    "cholesky_solve, columns": Row((3,), 1, lambda b, c: torch.cholesky_solve(b, _matrix()), 1),
    "ormqr, columns": Row((3,), 1, lambda b, c: torch.ormqr(*torch.geqrf(_matrix()), b), 1),
    "bilinear, weights": Row((3, 4), 0, lambda w, c: F.bilinear(_drawn(5, 3), _drawn(5, 4), w), 1),
    "logcumsumexp": Row((4,), 0, lambda x, c: torch.logcumsumexp(x, 1), 0),
    "matrix_exp": Row((3, 3), 0, lambda x, c: torch.matrix_exp(x), 0),
}


CASES = [
    (name, (outer, inner))
    for name, row in ROWS.items()
    for outer, inner in PATTERNS
    if outer * M * inner % row.step == 0
]


@final
class Along(nn.Module):
    """A linear layer, poses put along a dimension, a function, and a number per pose."""

    def __init__(self, row: Row, pattern: Pattern) -> None:
        super().__init__()
        self.row, (self.outer, self.inner) = row, pattern
        self.sizes = (self.outer, self.inner, *row.others)
        self.linear = nn.Linear(FEATURES, prod(self.sizes), dtype=torch.float64)

    def forward(self, poses: Tensor) -> Tensor:
        made = self.linear(poses).reshape(M, *self.sizes).transpose(0, 1).flatten(0, 2)
        found = self.row.function(made.movedim(0, self.row.dim), len(made))
        found = found.movedim(self.row.out_dim, 0)
        found = found.reshape(self.outer * self.row.copies, M, -1)
        return (found.square() * (_drawn(*found.shape) + 3)).sum((0, 2))


@pytest.mark.parametrize(("name", "pattern"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore")  # that poses mix
def test_rows_are_exact_and_take_one_backward_where_poses_can_be_followed(
    name: str, pattern: Pattern
) -> None:
    row = ROWS[name]
    model = Along(row, pattern)
    found = read(model, lambda: model(_drawn_anew(M, FEATURES)))
    assert found.is_fast or found.kind in ("probed", "mixing"), found
    assert found.is_fast or pattern not in row.followed, found


def _drawn_anew(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SOLVERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": torch.linalg.solve,
    "solve_triangular": lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
    "lu_solve": lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b, a),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("argument", [0, 1], ids=["matrix", "right side"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.filterwarnings("ignore")  # that poses mix
def test_batches_of_systems_that_broadcast_line_up_at_the_end(
    name: str, argument: int, dim: int
) -> None:
    """Poses lie in the first dimension of one argument, which is the second of the solutions."""

    def solve(x: Tensor, count: int) -> Tensor:
        given = [_matrix(M, M), _drawn(M, M, 3, 2)]
        given[argument] = x + _matrix(1) if argument == 0 else x
        return SOLVERS[name](*given)

    shape = (3, 3) if argument == 0 else (3, 2)
    model = Along(Row(shape, 0, solve, dim), (1, 1))
    found = read(model, lambda: model(_drawn_anew(M, FEATURES)))
    assert found.kind == ("inferred" if dim == 1 else "mixing"), found
