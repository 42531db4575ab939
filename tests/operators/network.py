"""An operator in the middle of a network, and what its Jacobian costs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from posegrad import Engine
from posegrad.graph import _inference, _vjp
from tests.operators.samples import Pair, Sample
from tests.reference import rows, trainable

__all__ = ["TOLERANCE", "Middle", "Outcome", "Reading", "examine", "node_names", "read"]

FEATURES = 3
TOLERANCE = 1e-10
NEAR = 1e-3  # how far from the sample its argument may be, so that it stays in the domain

MIXING, SLOWER = "The predictions of different poses depend", "do not add up to autograd's"


class Middle(nn.Module):
    """A linear layer for each argument with poses, an operator, and a sum over all but the poses.

    Args:
        sample: The call of the operator; its other arguments are constant.
        pair: Where the poses lie.
    """

    def __init__(self, sample: Sample, pair: Pair) -> None:
        super().__init__()
        self.sample, self.pair = sample, pair
        self.bases = {i: sample.arguments[i].movedim(dim, 0) for i, dim in pair.dims.items()}
        sizes = {i: base[0].numel() for i, base in self.bases.items()}
        self.linears = nn.ModuleDict(
            {str(i): nn.Linear(FEATURES, size, dtype=torch.float64) for i, size in sizes.items()}
        )

    def inputs(self) -> Tensor:
        """New poses."""
        count = len(next(iter(self.bases.values())))
        return torch.randn(count, FEATURES, dtype=torch.float64)

    def forward(self, poses: Tensor) -> Tensor:
        arguments = list(self.sample.arguments)
        for i, base in self.bases.items():
            change = self.linears[str(i)](poses).reshape(base.shape)
            arguments[i] = (base + NEAR * change).movedim(0, self.pair.dims[i])
        return _per_pose(self.sample.call(arguments), self.pair.out_dim)


def _per_pose(output: Tensor, dim: int) -> Tensor:
    others = [other for other in range(output.ndim) if other != dim]
    weighted = output * _weights(output)
    return weighted.sum(others) if others else weighted


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(output.shape, dtype=output.dtype, generator=generator)
    return drawn + 0.5


@dataclass(frozen=True)
class Reading:
    """What reading a Jacobian several times came to.

    Args:
        backwards: How many the last call took.
        mixes: Whether a warning said that poses mix.
        disagreed: Whether a warning said that rows were wrong at first.
        error: The largest difference from plain autograd, relative to the largest number.
        is_finite: Whether all numbers are finite.
        alone: Whether some operator was probed alone, in the last call.
    """

    backwards: int
    mixes: bool
    disagreed: bool
    error: float
    is_finite: bool = True
    alone: bool = False

    @property
    def kind(self) -> str:
        """In one word."""
        if not self.error <= TOLERANCE:
            return "wrong"
        if not self.is_finite:
            return "not finite"
        if self.disagreed:
            return "doubted"
        if self.mixes:
            return "mixing"
        if self.backwards > 1:
            return "probed"
        return "alone" if self.alone else "inferred"

    @property
    def is_fast(self) -> bool:
        """Whether it is right, and takes one backward."""
        return self.kind in ("inferred", "alone")


@dataclass(frozen=True)
class Outcome:
    """What came of one call of an operator with poses along one dimension."""

    sample: Sample
    pair: Pair
    nodes: frozenset[str]
    reading: Reading


def examine(sample: Sample, pair: Pair) -> Outcome:
    """Reads the Jacobian of a network around an operator, in every way."""
    with torch.random.fork_rng():  # samples are drawn in between
        torch.manual_seed(0)
        model = Middle(sample, pair)
        found = read(model, lambda: model(model.inputs()))
    return Outcome(sample, pair, node_names(sample, pair), found)


def read(model: nn.Module, output: Callable[[], Tensor]) -> Reading:
    """Reads Jacobians of one structure, with check "first" and then with "never".

    Args:
        model: The model.
        output: Scores new poses.
    """
    checked, unchecked = Engine(model, check="first"), Engine(model, check="never")
    found = [_read_once(engine, model, output()) for engine in [checked] * 2 + [unchecked] * 2]
    return Reading(
        found[-1].backwards,
        any(each.mixes for each in found),
        any(each.disagreed for each in found),
        max(each.error for each in found),
        all(each.is_finite for each in found),
        found[-1].alone,
    )


def _read_once(engine: Engine, model: nn.Module, output: Tensor) -> Reading:
    expected = rows(output, trainable(model))
    backwards, alone = _counted(_vjp, "backward_to"), _counted(_inference, "probed_alone")
    with warnings.catch_warnings(record=True) as caught, backwards as count, alone as single:
        warnings.simplefilter("always")
        matrix = engine.jacobian(output).matrix()
    said = " ".join(str(warning.message) for warning in caught)
    error, is_finite = _error(matrix, expected), bool(expected.isfinite().all())
    return Reading(len(count), MIXING in said, SLOWER in said, error, is_finite, bool(single))


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference where autograd is finite, relative to its largest number."""
    able = expected.isfinite()
    difference = (found - expected)[able].abs()
    size = expected[able].abs().max().clamp(min=1e-300) if able.any() else 1.0
    return float((difference / size).nan_to_num(nan=torch.inf).amax()) if able.any() else 0.0


@contextmanager
def _counted(module: ModuleType, name: str) -> Iterator[list[None]]:
    """One entry for each call of a function by the code of a module."""
    count: list[None] = []
    function = getattr(module, name)

    def counting(*args: object, **kwargs: object) -> object:
        count.append(None)
        return function(*args, **kwargs)

    with patch.object(module, name, counting):
        yield count


def node_names(sample: Sample, pair: Pair) -> frozenset[str]:
    """The kinds of nodes between an operator's output and its arguments with poses."""
    leaves = list(sample.arguments)
    for i in pair.dims:
        leaves[i] = leaves[i].clone().requires_grad_()
    seen: set[Node] = set()
    waiting = [sample.call(leaves).grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
    names = {node.name() for node in seen}
    return frozenset(name for name in names if "AccumulateGrad" not in name)
