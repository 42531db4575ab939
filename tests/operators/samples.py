"""Calls of torch's own operators, and where they keep poses apart.

The calls are those of torch's operator database. Which dimensions keep poses apart is measured, not
looked up: a dimension of an argument and one of the output belong together if each entry of the
output's depends on the entry of the same number of the argument's, and on no other.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "LOOKED_AT",
    "OPERATORS",
    "SKIPPED",
    "Pair",
    "Sample",
    "name_of",
    "pairs_of",
    "samples_of",
]

MOST_NUMBERS, MOST_POSES = 1024, 32  # of a tensor, of a dimension: larger samples add no structure
ROUNDING, SMALL = 1e-12, 1e-3  # gradients that are zero but for rounding, or may have lost digits
LOOKED_AT = 60  # samples of one operator, in the database's order

_REASONS = {
    "sparse": "sparse tensors, which have no dimension of poses",
    "to_sparse": "sparse tensors, which have no dimension of poses",
    "zero_": "in place",
    "as_strided.partial_views": "reads memory beside its argument",
}


class Pair(NamedTuple):
    """Where poses can lie.

    Args:
        dims: By the number of an argument among the differentiable ones, its dimension of poses.
        out_dim: That of the output.
        keeps: Whether poses are kept apart.
    """

    dims: Mapping[int, int]
    out_dim: int
    keeps: bool


@dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Args:
        operator: Its name in the database.
        number: Which of the operator's samples it is.
        call: From the differentiable arguments to the first differentiable output.
        arguments: The differentiable arguments, detached.
        told: The shapes of all tensors, and all other arguments, as text.
    """

    operator: str
    number: int
    call: Callable[[Sequence[Tensor]], Tensor]
    arguments: tuple[Tensor, ...]
    told: str


def name_of(operator: OpInfo) -> str:
    """The operator and its variant."""
    variant = operator.variant_test_name
    return f"{operator.name}.{variant}" if variant else str(operator.name)


def _why_skipped(operator: OpInfo) -> str | None:
    if torch.float64 not in operator.supported_dtypes("cpu"):
        return "no float64 on the CPU"
    if not operator.supports_autograd:
        return "no gradient"
    return _REASONS.get(name_of(operator).split(".")[0]) or _REASONS.get(name_of(operator))


SKIPPED: dict[str, str] = {
    name_of(operator): reason for operator in op_db if (reason := _why_skipped(operator))
}
"""By name, why an operator of the database is not looked at."""

OPERATORS: dict[str, OpInfo] = {
    name_of(operator): operator for operator in op_db if name_of(operator) not in SKIPPED
}
"""The others, by name."""


def samples_of(name: str) -> Iterator[tuple[Sample, Sample]]:
    """Samples of an operator that differ in more than numbers, each drawn twice."""
    told = set()
    for number, drawn in enumerate(_drawn(OPERATORS[name])):
        first, second = (_sample(OPERATORS[name], number, one) for one in drawn)
        if first is None or second is None or first.told != second.told or first.told in told:
            continue
        told.add(first.told)
        yield first, second


def pairs_of(first: Sample, second: Sample) -> list[Pair]:
    """Where poses could lie: in one argument, or, if they are kept apart, in several at once.

    Args:
        first: A call.
        second: The same with other numbers. What keeps poses apart does so in both.
    """
    found = []
    together: dict[int, dict[int, int]] = {}
    for argument, value in enumerate(first.arguments):
        if max(value.shape, default=0) > 1:
            other = _apart(second, argument)
            for (dim, out_dim), keeps in _apart(first, argument).items():
                if (dim, out_dim) in other:
                    both = keeps and other[dim, out_dim]
                    found.append(Pair({argument: dim}, out_dim, both))
                    if both:
                        together.setdefault(out_dim, {}).setdefault(argument, dim)
    return found + [Pair(dims, out, True) for out, dims in together.items() if len(dims) > 1]


def _drawn(operator: OpInfo) -> Iterator[tuple[SampleInput, SampleInput]]:
    """Each sample with other numbers as well; drawn alike each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    # Not sample_inputs(): it draws every sample from one seed, and looks at the stack each time.
    draw = operator.sample_inputs_func
    draws = [iter(draw(operator, "cpu", torch.float64, True)) for _ in range(2)]
    for _ in range(LOOKED_AT):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = (next(samples, None) for samples in draws)
        if first is None or second is None:
            return
        yield first, second


def _sample(operator: OpInfo, number: int, drawn: SampleInput) -> Sample | None:
    """None if nothing can be differentiated, it is too large, or something random is drawn."""
    leaves, spec = tree_flatten((drawn.input, drawn.args, drawn.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(t.layout != torch.strided or t.numel() > MOST_NUMBERS for t in tensors):
        return None
    places = [i for i, leaf in enumerate(leaves) if _is_differentiable(leaf)]
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def call(arguments: Sequence[Tensor]) -> Tensor:
        filled = list(leaves)
        for place, argument in zip(places, arguments, strict=True):
            filled[place] = argument
        own, args, kwargs = tree_unflatten(filled, spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _first(drawn.output_process_fn_grad(operator.op(own, *args, **kwargs)))

    arguments = tuple(leaves[place] for place in places)
    told = ", ".join(_told(leaf) for leaf in leaves)
    sample = Sample(name_of(operator), number, call, arguments, told)
    return sample if _is_sound(sample) else None


def _is_differentiable(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dtype == torch.float64


def _told(leaf: object) -> str:
    return f"{leaf.dtype}{tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _first(output: Any) -> Tensor:
    """The first output that has a graph; complex numbers as pairs."""
    able = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad]
    if not able:
        raise NotImplementedError("nothing to differentiate")
    return torch.view_as_real(able[0].resolve_conj()) if able[0].is_complex() else able[0]


def _is_sound(sample: Sample) -> bool:
    leaves = [a.requires_grad_() for a in map(torch.clone, sample.arguments)]
    if not any(leaf.ndim for leaf in leaves):  # no dimension could count poses
        return False
    try:
        one, other = sample.call(leaves), sample.call(leaves)
    except NotImplementedError:
        return False
    small = 0 < one.numel() <= MOST_NUMBERS
    return small and one.dtype == torch.float64 and torch.equal(one, other)


def _apart(sample: Sample, argument: int) -> dict[tuple[int, int], bool]:
    """Dimensions of equal size, of an argument and the output, and whether they keep poses apart.

    Those whose whole gradient is zero, or what cancellation left, are left out.
    """
    leaves = list(sample.arguments)
    leaves[argument] = leaf = leaves[argument].clone().requires_grad_()
    try:
        output = sample.call(leaves)
    except NotImplementedError:
        return {}
    found = {}
    for out_dim, count in enumerate(output.shape):
        able = [dim for dim, size in enumerate(leaf.shape) if size == count]
        if able and 1 < count <= MOST_POSES and leaf.numel():
            rows = _rows(output, out_dim, leaf)
            if bool(rows.isfinite().all()) and float(rows.abs().max()) > SMALL:
                found.update({(dim, out_dim): _is_diagonal(rows, dim) for dim in able})
    return found


def _rows(output: Tensor, dim: int, leaf: Tensor) -> Tensor:
    """For every entry along a dimension the gradient of a random sum of it, `[m, *leaf.shape]`."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for entry in range(output.shape[dim]):
        cotangent = torch.zeros_like(output)
        cotangent.select(dim, entry).normal_(generator=generator)
        (row,) = torch.autograd.grad(
            output, leaf, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(row)
    return torch.stack(rows)


def _is_diagonal(rows: Tensor, dim: int) -> bool:
    """Whether entry i along a dimension is reached by row i alone, and by several rows at all."""
    sizes = rows.movedim(dim + 1, 1).reshape(len(rows), len(rows), -1).abs().amax(2)  # [m, m]
    own = sizes.diagonal()
    return bool((sizes == torch.diag(own)).all()) and int((own > ROUNDING).sum()) > 1
