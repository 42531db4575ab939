"""What a rule that looks at gradients is: a Jacobian in, one gradient out.

A combination rule sees the predictions of a group alone. The rules here see the per-pose gradients:
their inner products (`Weighting`), or the gradients themselves, one parameter at a time
(`Aggregation`). Neither kind sees the model, and none of them holds a whole Jacobian.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from posegrad._restoring import Change, no_autocast, no_graph, restoring
from posegrad.errors import NonFiniteGradientError, ShapeMismatchError, listed

__all__ = ["Aggregation", "GradientRule", "Jacobian", "Step", "Weighting"]


class Jacobian(Protocol):
    """What a rule asks of a `PoseJacobian`: M rows, one for each number of the output."""

    predictions: Tensor

    @property
    def used(self) -> Sequence[str]:
        """The parameters the output depends on."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of all parameters, in the order of the matrix's columns."""

    @property
    def mixed(self) -> Sequence[str]:
        """The parameters on whose way to the output poses influence each other."""

    def of(self, names: Sequence[str]) -> "Jacobian":
        """The rows of some parameters alone."""

    def release(self, names: Sequence[str]) -> None:
        """Frees the rows of some parameters, if nobody but the rule sees this Jacobian."""

    def gramian(self) -> Tensor:
        """The inner products of the rows, `output_shape + reversed(output_shape)`."""

    def norms(self) -> Tensor:
        """The norms of the rows, in the output's shape."""

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """The rows' weighted sum, by parameter."""

    def block(self, name: str) -> Tensor:
        """The rows of one parameter, `[*output_shape, *shape]`."""

    def matrix(self) -> Tensor:
        """All rows, `[M, n]`."""


@final
class Step(NamedTuple):
    """What a rule makes of a Jacobian.

    Args:
        gradients: What is added to `.grad`, by parameter. A tensor that the rule keeps is copied.
            A view, or a detached tensor, of what it keeps is not recognised: return a clone.
        weights: The weight of each row, in the output's shape; None if the rule has none.
    """

    gradients: Mapping[str, Tensor]
    weights: Tensor | None


class GradientRule(nn.Module, ABC):
    """Anything that turns a Jacobian into one gradient."""

    @property
    def has_noise(self) -> bool:
        """Whether noise hides single poses in the gradient, so that none may bypass the rule."""
        return False

    @abstractmethod
    def step(self, jacobian: Jacobian) -> Step:
        """The gradient of a group, from the gradients of its poses."""

    def _get_name(self) -> str:
        """What messages call the rule."""
        return type(self).__name__


class Weighting(GradientRule):
    r"""A rule :math:`w = f(G, \hat y)` on the Gramian :math:`G = J J^\top` of a group.

    The gradient is :math:`w^\top J`. As J enters by inner products alone, the rule costs no more
    than G does: for most layers that needs no gradient of any single pose.

    Laws, held by `posegrad.testing.assert_weighting`: there is one finite weight for each row, also
    where rows are zero or alike; the rule leaves G and the predictions as they are; equal calls
    give equal weights, and so do copies; renumbering the poses does not change the gradient. (It
    may change the weights: of two equal rows, either may carry the weight.)

    Shape:
        gramian `[M, M]`, symmetric, in float32 at least; predictions `[M]`, in the dtype they have;
        to weights `[M]`. An output of another shape is flattened. G has the unit of the squared
        prediction per squared parameter.

    Note:
        Time and memory: G, as of `Jacobian.gramian`, and one product with J.

    Example:
        >>> class Normalized(Weighting):
        ...     def forward(self, gramian, predictions):
        ...         return gramian.diagonal().clamp(min=1e-12).rsqrt()
        >>> Normalized()(torch.tensor([[4.0, 0.0], [0.0, 25.0]]), torch.zeros(2))
        tensor([0.5000, 0.2000])
    """

    @abstractmethod
    def forward(self, gramian: Tensor, predictions: Tensor) -> Tensor:
        """The weight of each row, `[M]`, from the Gramian `[M, M]` and the predictions `[M]`."""

    @restoring
    def weights(self, jacobian: Jacobian) -> Tensor:
        """The weights of a Jacobian's rows, in the shape of the output.

        Raises:
            NonFiniteGradientError: if a row has no finite norm, so that weights would mean nothing,
                or if a weight is not finite.
            ShapeMismatchError: if the rule does not give one weight for each row.
        """
        predictions = jacobian.predictions
        gramian = _flattened(jacobian.gramian(), predictions.ndim)
        check_finite(gramian.diagonal())
        with plainly():
            weights = self(gramian, predictions.reshape(-1))
        return checked(self, weights, predictions)

    def step(self, jacobian: Jacobian) -> Step:
        return weighted(jacobian, self.weights(jacobian))


class Aggregation(GradientRule):
    """A rule on the gradients themselves, one parameter at a time.

    Laws, held by `posegrad.testing.assert_aggregation`: the result has the shape of one row; equal
    calls give equal results, and so do copies; the order of the poses does not matter; rows that
    are all alike are their own aggregate; what a column gives depends on that column alone, so that
    blocks may come one by one; a column with a nan gives nan, so that it is seen.

    Shape:
        block `[M, ...]`, the rule's own to write to, in the parameter's dtype; to `[...]`.

    Note:
        Memory: the rows of one parameter.

    Example:
        >>> class Largest(Aggregation):
        ...     def forward(self, block):
        ...         return block.amax(0)
        >>> Largest()(torch.tensor([[1.0, 0.0], [3.0, -9.0]]))
        tensor([3., 0.])
    """

    @abstractmethod
    def forward(self, block: Tensor) -> Tensor:
        """The gradient of one parameter, `[...]`, from its rows `[M, ...]`."""

    @final
    def step(self, jacobian: Jacobian) -> Step:
        return Step({name: self._aggregated(jacobian, name) for name in jacobian.used}, None)

    def _aggregated(self, jacobian: Jacobian, name: str) -> Tensor:
        shape = jacobian.predictions.numel(), *jacobian.shapes[name]
        block = jacobian.block(name).reshape(shape)  # [M, *shape]
        with plainly():
            gradient: Tensor = self(block)
        if gradient.shape != block.shape[1:]:
            raise ShapeMismatchError(
                f"{self._get_name()} made {list(gradient.shape)} of the rows of {name}, "
                f"{list(block.shape)}; a gradient has the shape of one row, "
                f"{list(block.shape[1:])}.\nReduce dimension 0 in forward, and no other."
            )
        return gradient.clone()  # it becomes .grad: no view of the rows, nothing of the rule's


@final
class plainly(Change):  # noqa: N801
    """How a rule's own arithmetic runs: without a graph, and without the user's autocast.

    A Gramian in float32 would be of no use to a rule whose products are cast to bfloat16.
    """

    def make(self) -> None:
        no_graph().__enter__()
        no_autocast().__enter__()

    def undo(self) -> None:
        pass  # each does that for itself


def weighted(jacobian: Jacobian, weights: Tensor) -> Step:
    """The weighted sum of a Jacobian's rows."""
    gradients = jacobian.combine(weights)
    return Step({name: gradients[name] for name in jacobian.used}, weights)


def checked(rule: GradientRule, weights: Tensor, predictions: Tensor) -> Tensor:
    """The weights a rule gave, in the shape of the predictions, as a tensor of their own.

    Raises:
        ShapeMismatchError: if there is not one for each row.
        NonFiniteGradientError: if one is not finite.
    """
    count, name = predictions.numel(), rule._get_name()
    if weights.shape != (count,):
        raise ShapeMismatchError(
            f"{name} gave weights of shape {list(weights.shape)} for {count} rows.\n"
            f"Return one weight for each row, [{count}]."
        )
    weights = weights.detach().to(predictions.device, copy=True)  # else perhaps the rule's state
    if not _all_finite(weights):
        shown = [f"{weight:g}" for weight in weights.tolist()]
        raise NonFiniteGradientError(
            f"{name} gave weights that are not finite: {listed(shown)}.\n"
            f"The rows are finite, so the rule itself failed on them; no .grad was touched.\n"
            f"See whether they are all zero, or far too small or large for it: J.norms()."
        )
    return weights.reshape(predictions.shape)


def check_finite(squares: Tensor) -> None:
    """Refuses rows that are nan or infinite: many rules would hide them behind finite weights.

    Args:
        squares: Their squared norms, `[M]`.

    Raises:
        NonFiniteGradientError: naming them.
    """
    if _all_finite(squares):
        return
    rows = (~squares.isfinite()).nonzero().flatten().tolist()
    raise NonFiniteGradientError(
        f"The gradients of {len(rows)} of {len(squares)} rows, or their squares, are not finite: "
        f"rows {listed(rows)}.\n"
        f"Weights that look at them would be arbitrary; no .grad was touched.\n"
        f"Leave those poses out. Under a GradScaler, do not scale the loss: backward(rule, "
        f"scaler=scaler) skips the step as the scaler would."
    )


def _all_finite(values: Tensor) -> bool:
    """A finite sum has finite terms; one that is not may have overflowed."""
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _flattened(gramian: Tensor, ndim: int) -> Tensor:
    """From `output_shape + reversed(output_shape)` to `[M, M]`."""
    order = [*range(ndim), *reversed(range(ndim, 2 * ndim))]
    count = gramian.numel() ** 0.5
    return gramian.permute(order).reshape(round(count), round(count))
