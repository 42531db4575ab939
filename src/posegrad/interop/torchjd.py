"""TorchJD's rules, as they are.

`J.backward(rule)` and `engine.backward(output, rule)` take every `Weighting` and `Aggregator` of
TorchJD directly; nothing of this file has to be called. It says what each one is given:

- *the number of rows*, where that is all it asks (`Mean`, `Sum`, `Random`, `Constant`);
- *the Gramian*, where it reads nothing else: weightings of a `PSDMatrix`, and their aggregators;
- *the rows of one parameter after another*, where each column is treated by itself
  (`TrimmedMean`, `GradDrop`), so that the matrix is never held;
- *the matrix*, for the rest (`ConFIG`, `NashMTL`, `ExcessMTL`, compositions, classes of one's own).

The rule object itself is called, so one that keeps state keeps it, and its hooks run. Rules draw
from torch's global generator where they do in TorchJD. Half precisions reach them as float32.
"""

from typing import Any, final, get_args

import torch
from torch import Tensor

from posegrad._restoring import Change
from posegrad._torch import has_forward_hooks
from posegrad.errors import MissingExtraError, ShapeMismatchError, UnsupportedModuleError
from posegrad.jacobian._precision import wide
from posegrad.weighting import Aggregation, GradientRule, Step, Weighting
from posegrad.weighting._base import Jacobian, check_finite, checked, plainly, weighted

try:
    from torchjd import aggregation as theirs
    from torchjd.linalg import Matrix, PSDMatrix
except ImportError as error:
    raise MissingExtraError(
        "posegrad.interop.torchjd needs TorchJD, which is not installed.\n"
        "Run: pip install 'posegrad[torchjd]'"
    ) from error

__all__ = ["adapted", "looks_at_gradients", "weighs_two_batches"]

_COUNTING = (
    theirs.ConstantWeighting,
    theirs.MeanWeighting,
    theirs.RandomWeighting,
    theirs.SumWeighting,
)
_BY_COLUMN = (theirs.GradDrop, theirs.TrimmedMean)
_OF_TWO_BATCHES = (theirs.MoDoWeighting, theirs.SDMGradWeighting)


def _same(matrix: Any) -> Any:
    return matrix


_COMPOSITION = type(theirs.MeanWeighting() << _same)  # of any function of the matrix


def looks_at_gradients(rule: object) -> bool:
    """Whether an object of TorchJD's is a rule on Jacobians; some are on losses."""
    return isinstance(rule, theirs.Weighting | theirs.Aggregator)


def adapted(rule: Any) -> GradientRule | None:
    """A rule of TorchJD's as one of ours; None if it does not look at gradients.

    Raises:
        UnsupportedModuleError: if it wants products of two batches' Jacobians, or is a weighting
            that does not say what it reads.
    """
    if isinstance(rule, theirs.Weighting):
        return _of_weighting(rule, _statistic(rule))
    if isinstance(rule, theirs.GramianWeightedAggregator):
        return _of_weighted(rule, rule.gramian_weighting, PSDMatrix)
    if isinstance(rule, theirs.WeightedAggregator):
        return _of_weighted(rule, rule.weighting, Matrix)
    if isinstance(rule, theirs.Aggregator):
        by_column = type(rule) in _BY_COLUMN and not has_forward_hooks(rule)
        return _ByColumn(rule) if by_column else _OfMatrix(rule)
    return None


def _of_weighted(rule: Any, weighting: Any, reads: type) -> GradientRule:
    """An aggregator that weighs rows, as its weighting; whole, if it does anything besides."""
    if _is_weighted_sum(rule):
        return _of_weighting(weighting, reads)
    _refuse_two_batches(weighting)
    return _OfMatrix(rule)


def _of_weighting(rule: Any, reads: type | None) -> GradientRule:
    _refuse_two_batches(rule)
    if _counts(rule):
        return _WeightsOfCount(rule)
    if reads is None:
        raise UnsupportedModuleError(
            f"{type(rule).__name__} does not say what its weights are made of.\n"
            f"Write class {type(rule).__name__}(Weighting[PSDMatrix]) if it reads the Gramian, or "
            f"Weighting[Matrix] if it reads the matrix; both types are in torchjd.linalg."
        )
    return _WeightsOfGramian(rule) if issubclass(reads, PSDMatrix) else _WeightsOfMatrix(rule)


def _refuse_two_batches(rule: Any) -> None:
    if isinstance(rule, theirs.CRMOGMWeighting):
        _refuse_two_batches(rule.weighting)
    elif weighs_two_batches(rule):
        raise UnsupportedModuleError(
            f"{type(rule).__name__} wants the product of the Jacobians of two independent batches, "
            f"and a Gramian is that of one with itself: it would not converge.\n"
            f"Pass the losses of both: engine.backward((losses_1, losses_2), rule)."
        )


def weighs_two_batches(rule: object) -> bool:
    """Whether a rule's weights are made of the product of two batches' Jacobians."""
    if isinstance(rule, theirs.CRMOGMWeighting):
        return weighs_two_batches(rule.weighting)
    return isinstance(rule, _OF_TWO_BATCHES)


def _counts(rule: Any) -> bool:
    """Whether a weighting asks for nothing but the number of rows."""
    if isinstance(rule, theirs.CRMOGMWeighting) and not has_forward_hooks(rule):
        return _counts(rule.weighting)
    return type(rule) in _COUNTING and not has_forward_hooks(rule)


def _statistic(rule: Any) -> type | None:
    """What a weighting reads, `PSDMatrix` for a Gramian or `Matrix`; None if it does not say."""
    if isinstance(rule, theirs.CRMOGMWeighting):
        return _statistic(rule.weighting)
    if isinstance(rule, _COMPOSITION):
        return Matrix
    bases = [base for kind in type(rule).__mro__ for base in vars(kind).get("__orig_bases__", ())]
    stated = [kind for base in bases for kind in get_args(base) if isinstance(kind, type)]
    return next((kind for kind in stated if issubclass(kind, Matrix)), None)


def _is_weighted_sum(rule: Any) -> bool:
    """Whether an aggregator multiplies the rows with its weights, and nothing besides."""
    kind, plain = type(rule), theirs.WeightedAggregator
    if kind.forward is not plain.forward or kind._combine is not plain._combine:
        return False
    around = rule.weighting if isinstance(rule, theirs.GramianWeightedAggregator) else rule
    return not has_forward_hooks(rule) and not has_forward_hooks(around)


class _OfTheirs(GradientRule):
    """A rule of TorchJD's."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule

    def _get_name(self) -> str:
        return type(self.rule).__name__


@final
class _WeightsOfCount(_OfTheirs):
    """A weighting of the number of rows."""

    def step(self, jacobian: Jacobian) -> Step:
        predictions = jacobian.predictions
        rows = wide(predictions.reshape(-1, 1))
        with plainly():
            weights = self.rule(torch.zeros_like(rows))
        return weighted(jacobian, checked(self, weights, predictions))


@final
class _WeightsOfGramian(_OfTheirs, Weighting):
    """A weighting of the Gramian."""

    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        weights: Tensor = self.rule(gramian)
        return weights


@final
class _WeightsOfMatrix(_OfTheirs):
    """A weighting of the matrix."""

    def step(self, jacobian: Jacobian) -> Step:
        matrix = _finite(jacobian)
        with plainly(), _gramians_made(self.rule):
            weights = self.rule(matrix)
        del matrix
        return weighted(jacobian, checked(self, weights, jacobian.predictions))


@final
class _ByColumn(_OfTheirs, Aggregation):
    """An aggregator that treats each column by itself."""

    def forward(self, block: Tensor) -> Tensor:
        shape = block.shape[1:]
        gradient: Tensor = self.rule(block.reshape(len(block), shape.numel()))
        return gradient.reshape(shape)


@final
class _OfMatrix(_OfTheirs):
    """An aggregator of the matrix."""

    def step(self, jacobian: Jacobian) -> Step:
        matrix = _finite(jacobian)
        with plainly():
            gradient = self.rule(matrix)
        if gradient.shape != matrix.shape[1:]:
            raise ShapeMismatchError(
                f"{self._get_name()} made {list(gradient.shape)} of a matrix "
                f"{list(matrix.shape)}.\nReturn one number for each column, [{matrix.shape[1]}]."
            )
        shapes = jacobian.shapes
        pieces = gradient.split([shape.numel() for shape in shapes.values()])
        found = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), pieces, strict=True)}
        return Step({name: found[name].clone() for name in jacobian.used}, None)  # else the rule's


def _finite(jacobian: Jacobian) -> Tensor:
    """The matrix `[M, n]`, in float32 at least, if it is finite."""
    matrix = wide(jacobian.matrix())
    check_finite(torch.linalg.vector_norm(matrix, dim=1))
    return matrix


@final
class _gramians_made(Change):  # noqa: N801
    """Within the block, a function composed with a weighting of Gramians must return one."""

    def __init__(self, rule: Any) -> None:
        inner = rule
        while isinstance(inner, (_COMPOSITION, theirs.CRMOGMWeighting)):
            inner = inner.weighting
        stated = _statistic(inner)
        self._inner = inner if stated is not None and issubclass(stated, PSDMatrix) else None
        self._handles: list[Any] = []

    def make(self) -> None:
        if self._inner is not None:
            # One call from C: an interrupt between the two steps would lose the handle.
            self._handles.extend(map(self._inner.register_forward_pre_hook, (_check_square,)))

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()


def _check_square(rule: Any, args: tuple[Tensor]) -> None:
    (found,) = args
    if found.ndim != 2 or len(found) != found.shape[1]:
        name = type(rule).__name__
        raise ShapeMismatchError(
            f"In {name} << f, f made {list(found.shape)} of the matrix of gradients, but {name} "
            f"reads a Gramian [m, m].\n"
            f"f is given the matrix [m, n]. For a function of the Gramian, write a "
            f"Weighting[PSDMatrix] that calls both."
        )
