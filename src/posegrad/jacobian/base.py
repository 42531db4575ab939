"""The Jacobian of a group of predictions, as a linear operator."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, Self, final, overload

import torch
from torch import Tensor

from posegrad.errors import ShapeMismatchError, listed
from posegrad.jacobian._deliver import Gradient
from posegrad.jacobian._iterate import each, numbers_along, one_at, picks_one, rows_at
from posegrad.jacobian._parts import checked_weights
from posegrad.jacobian._products import crossed, generalized
from posegrad.jacobian._solving import checked_damping, solved
from posegrad.weighting._rules import AnyRule

__all__ = ["Jacobian", "Transposed"]

Index = int | tuple[int, ...]
"""The index of one number of the output, or of an entry of its dimension 0."""

Indices = slice | list[int] | list[bool] | range | Tensor
"""The index of several entries of dimension 0: a slice, numbers or a mask."""


class Jacobian(ABC):
    r"""The rows :math:`\partial \hat y_i / \partial \theta` of a group, as a linear operator.

    Row i of the Jacobian J `[M, n]` is the gradient of one number of the output by all n
    parameters. J is only formed on request: for most layers it holds their input and the cotangent
    of their output, the *factors*, and takes products with J from these. Each product uses factors
    or rows, whichever is cheaper.

    Made by `Engine.jacobian` and `Engine.gather`. A `PoseJacobian` holds all rows. In a
    `SharedJacobian`, whose poses several processes share, each rank holds its own rows; all ranks
    call its methods together, in the same order, and get the same results.

    Immutable; keeps no graph of the model. Intermediate results of products, such as a parameter's
    rows, are kept for the next product.

    Attributes:
        predictions: The output, of `output_shape`, detached.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))  # of two poses
        >>> J.shape, J.output_shape, len(J)
        (torch.Size([2, 3]), torch.Size([2]), 2)
        >>> J @ torch.tensor([1.0, 2.0, 10.0])  # two numbers of the weight, one of the bias
        tensor([11., 12.])
        >>> torch.tensor([1.0, 10.0]) @ J
        {'weight': tensor([[ 1., 10.]]), 'bias': tensor([11.])}
        >>> J @ J[:1].T
        tensor([[2.],
                [1.]])
    """

    predictions: Tensor
    _parameters: dict[str, Tensor]

    @property
    @abstractmethod
    def used(self) -> Sequence[str]:
        """The parameters that the output depends on."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """The parameters' shapes, in the order of the columns of `matrix`."""

    @property
    @abstractmethod
    def mixed(self) -> Sequence[str]:
        """The parameters on whose way to the output poses of this rank may mix."""

    @abstractmethod
    def of(self, names: Sequence[str]) -> Self:
        """The rows of some parameters only; shares what this Jacobian holds."""

    @property
    def output(self) -> Tensor:
        """The output that J is the Jacobian of, detached."""
        return self.predictions

    @property
    def output_shape(self) -> torch.Size:
        """The shape of the output; it has M elements."""
        return self.predictions.shape

    @property
    def shape(self) -> torch.Size:
        """`[M, n]`: how many numbers the output and the parameters have."""
        columns = sum(shape.numel() for shape in self.shapes.values())
        return torch.Size([self.predictions.numel(), columns])

    @property
    def T(self) -> "Transposed":  # noqa: N802, as everybody calls it
        """The transpose, for `J.T @ w` and `J @ K.T`."""
        return Transposed(self)

    def __len__(self) -> int:
        return len(self.predictions)

    def __matmul__(self, other: "Tensor | Mapping[str, Tensor] | Transposed") -> Tensor:
        r"""The product :math:`J v` with directions of the parameters, or :math:`J K^\top`.

        Row i of :math:`J v` is the derivative of output i as the parameters move along v.

        Args:
            other: v: a vector `[n]` or a matrix `[n, k]`, in the order of `shapes`; or a dict of
                tensors by parameter, in which parameters left out do not move. Or `K.T` of a
                Jacobian K by parameters of the same names and shapes, e.g. those of a copy of the
                model at another step of its training: columns are matched by name, whatever the
                values.

        Returns:
            J v in `output_shape`, with k at the end for `[n, k]`. For `K.T`, the inner products of
            all rows of J with all of K, shaped `output_shape + reversed(K.output_shape)` as for
            `gramian`: for `[m]` and `[m']`, `[m, m']`.

        Raises:
            ShapeMismatchError: if v does not fit the parameters, or K has other parameters.
            KeyError: if v names an unknown parameter.
            TypeError: if v is complex, or none of these.
            StaleFactorError: if a tensor the forward saved was changed in place since.

        Note:
            :math:`J v` takes the change of each layer's output along v: one product a layer and no
            weight gradient, a third of a plain step. k directions take k times that; or rows are
            formed once and multiplied, if that is cheaper and they hold at most twice what the
            factors do.
            :math:`J K^\top` takes products of factors or of rows for each parameter, whichever are
            cheaper, as `gramian` does.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J @ {"bias": torch.tensor([3.0])}
            tensor([3., 3.])
        """
        if isinstance(other, Transposed):
            products = self._met(other.T)
            return crossed(products, self.output_shape, other.T.output_shape)
        return self._moved(other)

    def __rmatmul__(self, weights: Tensor) -> dict[str, Tensor]:
        r"""The product :math:`w^\top J`, as `combine`."""
        return self.combine(weights)

    @abstractmethod
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        r"""The product :math:`w^\top J`: one gradient, shaped and named like the parameters.

        Args:
            weights: w, of `output_shape`: one weight for each number of the output. If they differ
                between ranks, those of the first rank count.

        Returns:
            An entry for every trainable parameter, in the order of `named_parameters()`; zeros
            where the output does not depend on it.

        Raises:
            ShapeMismatchError: if the weights have another shape.
            TypeError: if they are complex.
            StaleFactorError: if a tensor the forward saved was changed in place since.

        Note:
            Time: half a plain backward, from factors; no graph is needed. Ranks multiply their own
            rows and sum the results, of parameter size, once.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J.combine(torch.tensor([1.0, 10.0]))
            {'weight': tensor([[ 1., 10.]]), 'bias': tensor([11.])}
        """

    @abstractmethod
    def backward(
        self, rule: Tensor | AnyRule, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor | None:
        r"""Adds the gradient a rule makes of J to the `.grad` of the parameters.

        Args:
            rule: The weights w of `output_shape`, for :math:`w^\top J`; a `Weighting` of the
                Gramian; an `Aggregation` of the rows, parameter by parameter; a weighting or an
                aggregator of TorchJD; or a combination rule h, whose parameters get their gradients
                too, for :math:`w = \partial h(\hat y) / \partial \hat y`.
            scaler: A gradient scaler whose `step` comes next. The gradient is multiplied by its
                scale; if rows are nan or infinite it is nan, so that the scaler skips the step.

        Returns:
            w, or None if the rule has no weights; nan where rows are nan or infinite.

        Raises:
            ShapeMismatchError: if w has another shape, or the rule gives more than one number.
            NonFiniteGradientError: if nan or infinite rows meet a rule that looks at them, without
                a scaler.
            StaleFactorError: as for `combine`. No `.grad` is touched by any of these.
            RankError: if another rank failed, or a rule that draws its own random numbers made
                different gradients on different ranks; `.grad` is untouched then too.

        Note:
            Time: what the rule looks at, then `combine`. Hooks on the parameters run once. `.grad`
            stays None where autograd would leave it None.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J.backward(Mean())
            tensor([0.5000, 0.5000])
            >>> model.weight.grad
            tensor([[0.5000, 0.5000]])
        """

    @abstractmethod
    def made_by(self, rule: Tensor | AnyRule, *, or_nan: bool = False) -> Gradient:
        """The gradient that `backward` would add to `.grad`, and the weights.

        Args:
            rule: The argument of `backward`.
            or_nan: Whether nan or infinite rows give a gradient of nan instead of an error.
        """

    @overload
    def gramian(
        self, dtype: torch.dtype | None = None, *, per_parameter: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def gramian(
        self, dtype: torch.dtype | None = None, *, per_parameter: Literal[True]
    ) -> dict[str, Tensor]: ...

    def gramian(
        self, dtype: torch.dtype | None = None, *, per_parameter: bool = False
    ) -> Tensor | dict[str, Tensor]:
        r"""The inner products of the rows, :math:`G = J J^\top`.

        Args:
            dtype: That of the result and the sums; default: the parameters', float32 at least.
            per_parameter: Return one Gramian for each parameter instead of their sum.

        Returns:
            G, of shape `output_shape + reversed(output_shape)`, which for `[m]` is `[m, m]`; or a
            dict of those, by parameter.

        Note:
            For R rows of a linear layer with d inputs and p outputs, time and memory are the lesser
            of `R^2 (d + p)`, without any gradient, and `(R + M^2) d p`, by rows. By rows, each of
            the M d p numbers is also written and read. The same goes for kernels, with positions
            for rows; most other layers go by rows. Over ranks, every row travels once, and no
            rank has the rows of more than one layer.

        References:
            Goodfellow, "Efficient per-example gradient computations" (2015), for one row per pose;
            Rochette et al. (2019) for convolutions.
        """
        if not per_parameter:
            return generalized(self._gram(dtype), self.output_shape)
        grams = self._grams(dtype)
        return {name: generalized(gram, self.output_shape) for name, gram in grams.items()}

    @overload
    def norms(self, *, per_parameter: Literal[False] = False) -> Tensor: ...

    @overload
    def norms(self, *, per_parameter: Literal[True]) -> dict[str, Tensor]: ...

    def norms(self, *, per_parameter: bool = False) -> Tensor | dict[str, Tensor]:
        """The Euclidean norm of every row, in `output_shape`.

        Args:
            per_parameter: Return a dict with the norms of each parameter's rows instead.

        Note:
            Time: for a linear layer with T rows per pose, or a kernel with T positions, the lesser
            of `m T^2 (d + p)`, without any gradient, and forming its rows. Tables take what was
            looked up, other layers their rows.

        References:
            Goodfellow (2015), as for `gramian`, for T = 1; Li et al., "Large language models can
            be strong differentially private learners", ICLR 2022.
        """
        return self._norms_of_each() if per_parameter else self._norms()

    def project(self, k: int, seed: int = 0) -> Tensor:
        r"""Random projections of the rows, whose inner products are on average those of the rows.

        The rows of each parameter, as matrices `[p, d]`, are projected from both sides,
        :math:`P_l g Q_l^\top / \sqrt k`, with matrices of signs :math:`P_l` `[k_1, p]` and
        :math:`Q_l` `[k_2, d]`, :math:`k = k_1 k_2`. A vector is folded into a matrix. The signs of
        different parameters are independent, so their projections add up to one, `[M, k]`. For two
        rows g and h, over seeds,

        .. math::
            \mathbb E \langle \tilde g, \tilde h \rangle = \langle g, h \rangle, \qquad
            \operatorname{Var} \langle \tilde g, \tilde h \rangle \le
            \Big(\frac 2 {k_1} + \frac 2 {k_2} + \frac 4 k\Big)
            \lVert g \rVert^2 \lVert h \rVert^2 .

        Args:
            k: The number of columns; :math:`k_1` and :math:`k_2` are its two closest factors, so a
                square number is best.
            seed: Rows projected with the same seed and k can be compared, also across Jacobians.
                The signs come from whole numbers drawn on the CPU for each parameter's name, the
                same on every machine.

        Returns:
            `[*output_shape, k]`, in float32 at least.

        Raises:
            ValueError: if k is no positive number.

        Note:
            Time: `R (d k_2 + p k_1 + k)` for R rows of a linear layer, from factors, without a
            gradient; kernels and tables likewise, other layers by rows.

        References:
            Choe et al., "What is your data worth to GPT? LLM-scale data valuation with influence
            functions" (LoGra, 2024), for the factored form.

        Example:
            >>> model = nn.Linear(64, 8)
            >>> J = Engine(model).jacobian(model(torch.randn(5, 64)).square().sum(1))
            >>> J.project(256).shape
            torch.Size([5, 256])
        """
        if type(k) is not int or k < 1:
            raise ValueError(f"k is {k!r}, but it is the number of columns, a whole number from 1.")
        return self._projected(k, seed).reshape(*self.output_shape, k)

    def solve(self, r: Tensor, damping: float = 0.0) -> Tensor:
        r"""The weights w with :math:`(J J^\top + \lambda I)\, w = r`.

        By Woodbury's identity, :math:`J^\top w = (J^\top J + \lambda I)^{-1} J^\top r`. So for
        residuals r, `J.backward(J.solve(r, damping))` puts a damped Gauss-Newton step into `.grad`,
        for the price of solving M equations instead of n.

        Args:
            r: Of `output_shape`.
            damping: :math:`\lambda`, not negative, in the unit of `gramian`.

        Returns:
            w, of `output_shape`, in the dtype of r; if r has whole numbers, in that of the rows.

        Raises:
            ShapeMismatchError: if r has another shape.
            ValueError: if the damping is negative.
            IllConditionedError: if rows are so nearly dependent that w would consist of rounding
                errors of the parameters' coarsest dtype.
            NonFiniteGradientError: if rows are nan or infinite.

        Note:
            G is computed and decomposed in float64, whatever J's dtype: M^3 operations.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J.solve(torch.tensor([3.0, 0.0]), damping=1.0)
            tensor([ 1.1250, -0.3750])
        """
        right = checked_weights(r, self.output_shape)
        damping = checked_damping(damping)
        eps = max((torch.finfo(dtype).eps for dtype in self._dtypes), default=0.0)  # of the rows
        gramian = self._gram_in_double()
        found = solved(gramian, right.reshape(-1).to(gramian.device), damping, eps)
        dtype = r.dtype if r.is_floating_point() else self._kind
        return found.reshape(self.output_shape).to(r.device, dtype)

    @overload
    def __getitem__(self, index: Index) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: Indices) -> Self: ...

    def __getitem__(self, index: Any) -> "dict[str, Tensor] | Self":
        """One row, or some of them as a Jacobian.

        Args:
            index: A number i: the rows of entry i of the output's dimension 0, by parameter,
                `[*output_shape[1:], *shape]`. A tuple with a number for each dimension: the
                gradient of that number of the output. A slice, a mask or numbers of entries, in any
                order: the Jacobian of these entries.

        Raises:
            IndexError: if it is out of range or none of these.

        Note:
            A Jacobian of some rows copies their factors or, where a layer does not allow that,
            rows. `J[i]` copies one entry and takes one `combine` of it for each number; over ranks,
            a `combine` of all rows.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J[0]
            {'weight': tensor([[1., 0.]]), 'bias': tensor([1.])}
            >>> J[torch.tensor([False, True])].matrix()
            tensor([[0., 1., 1.]])
        """
        if picks_one(index):
            return self._row(index)
        return self._picked(numbers_along(index, self.output_shape))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rows of each entry of dimension 0, by parameter: `J[0]`, `J[1]`, ..."""
        return each(self.output_shape, self._gradient)

    def _row(self, index: Any) -> dict[str, Tensor]:
        """The rows of an entry of dimension 0, or the gradient of one number."""
        place = index if isinstance(index, tuple) else (index,)
        inner = self.output_shape[len(place) :]
        if len(place) != 1 or not inner:
            return self._gradient(index)
        (entry,) = numbers_along([int(place[0])], self.output_shape).tolist()
        return rows_at(entry, inner, self._gradient)

    def _gradient(self, index: Any) -> dict[str, Tensor]:
        """The gradient of one number."""
        return self.combine(one_at(index, self.predictions))

    @staticmethod
    def cat(jacobians: "Sequence[Jacobian]") -> "Jacobian":
        """The rows of several Jacobians by the same parameters, one after another.

        Args:
            jacobians: One or more of one kind, whose outputs agree in all but dimension 0.

        Raises:
            ValueError: if there is none.
            TypeError: if some are shared by ranks and others are not.
            ShapeMismatchError: if their outputs or parameters do not agree.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> Jacobian.cat([J, J[:1]]).shape
            torch.Size([3, 3])
        """
        if not jacobians:
            raise ValueError("There are no Jacobians to put together: pass one or more.")
        first = jacobians[0]
        for number, other in enumerate(jacobians):
            check_columns(first, other, f"Jacobian {number}")
            own = other._parameters
            apart = [name for name, p in first._parameters.items() if own[name] is not p]
            if apart:
                raise ShapeMismatchError(
                    f"Jacobian {number} is by the parameters of another model, though their names "
                    f"and shapes are the same: {listed(apart)}.\n"
                    f"Rows that are put together have one gradient, which goes to one model."
                )
            if not other.output_shape or other.output_shape[1:] != first.output_shape[1:]:
                raise ShapeMismatchError(
                    f"Jacobian {number} has an output of shape {list(other.output_shape)}, the "
                    f"first {list(first.output_shape)}; they are put together along dimension 0, "
                    f"and must agree in the rest."
                )
        return first._followed(jacobians[1:])

    @abstractmethod
    def block(self, name: str) -> Tensor:
        """The rows of one parameter, `[*output_shape, *parameter.shape]`, all in memory.

        Raises:
            KeyError: if no trainable parameter has that name.
        """

    @abstractmethod
    def matrix(self) -> Tensor:
        """J as a matrix `[M, n]`, columns in the order of `shapes`.

        Memory: M n numbers, once; over ranks, on each of them.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The Jacobian on another device; `backward` still serves the parameters where they are."""

    @abstractmethod
    def report(self) -> str:
        """How many backwards J took, and by which path each parameter's rows came; if slow, why.

        Four or more parameters that differ only in the number of their layer share one line. What
        parameters share counts once in the first line, in full under `each`. Over ranks, the report
        covers this rank's rows.

        Example:
            >>> model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)), nn.Linear(3, 1))
            >>> print(Engine(model).jacobian(model(torch.ones(4, 3)).squeeze(1)).report())
            4 rows of 112 numbers, held in 928 B; as a matrix 1.75 KiB
            2 backwards: 1 to the activations, 1 to compare with plain autograd
            parameter           uses  held as  each  path
            {0-8}.weight (x 9)  1     factors  96 B  closed form (Linear)
            {0-8}.bias (x 9)    1     factors  48 B  closed form (Elementwise)
            9.weight            1     factors  64 B  closed form (Linear)
            9.bias              1     factors  16 B  closed form (Elementwise)
        """

    @abstractmethod
    def release(self, names: Sequence[str]) -> None:
        """Drops the rows of some parameters; only if nobody else holds this Jacobian."""

    @abstractmethod
    def consumed(self) -> Self:
        """This Jacobian, if nobody else holds it: rows that it forms replace the factors."""

    @property
    def _kind(self) -> torch.dtype:
        """The dtype of products: the widest of the parameters', float32 at least."""
        return reduce(torch.promote_types, self._dtypes, torch.float32)

    @property
    @abstractmethod
    def _dtypes(self) -> Sequence[torch.dtype]:
        """The dtypes of the parameters."""

    @abstractmethod
    def _moved(self, directions: object) -> Tensor:
        """J v, for v as users state it."""

    @abstractmethod
    def _met(self, other: "Jacobian") -> Tensor:
        """The inner products with the rows of another Jacobian, `[M, M']`."""

    @abstractmethod
    def _gram(self, dtype: torch.dtype | None) -> Tensor:
        """The Gramian `[M, M]`."""

    @abstractmethod
    def _grams(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The Gramian of each parameter, as a tensor of its own."""

    @abstractmethod
    def _gram_in_double(self) -> Tensor:
        """The Gramian `[M, M]`, with all products in float64."""

    @abstractmethod
    def _norms(self) -> Tensor:
        """The norms of the rows, in `output_shape`."""

    @abstractmethod
    def _norms_of_each(self) -> dict[str, Tensor]:
        """The norms of each parameter's rows."""

    @abstractmethod
    def _projected(self, k: int, seed: int) -> Tensor:
        """The projected rows, `[M, k]`."""

    @abstractmethod
    def _picked(self, index: Tensor) -> Self:
        """The Jacobian of some entries of dimension 0, by their numbers."""

    @abstractmethod
    def _followed(self, others: "Sequence[Jacobian]") -> Self:
        """Its own rows, followed by those of others, which `cat` has found to agree with it."""


@final
class Transposed:
    """The transpose of a Jacobian; made by `J.T`.

    Args:
        jacobian: J.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
        >>> J.T.shape, J.T @ torch.ones(2)
        (torch.Size([3, 2]), {'weight': tensor([[1., 1.]]), 'bias': tensor([2.])})
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian

    @property
    def shape(self) -> torch.Size:
        """`[n, M]`."""
        return self.T.shape[::-1]

    def __matmul__(self, weights: Tensor) -> dict[str, Tensor]:
        """The product with weights of J's `output_shape`, by parameter; as `J.combine`."""
        return self.T.combine(weights)

    def __repr__(self) -> str:
        return f"{self.T!r}.T"


def check_columns(one: Jacobian, other: Jacobian, what: str) -> None:
    """Refuses a Jacobian of another kind or by other parameters.

    Raises:
        TypeError: if one is shared by ranks and the other is not.
        ShapeMismatchError: if they have other parameters.
    """
    if type(one) is not type(other):
        raise TypeError(
            f"{what} is a {type(other).__name__}, the first a {type(one).__name__}: rows that one "
            f"process holds and rows that ranks share do not go together.\n"
            f"Gather both by engines of one kind."
        )
    if one.shapes != other.shapes:
        apart = sorted({name for name, _ in one.shapes.items() ^ other.shapes.items()})
        raise ShapeMismatchError(
            f"{what} is by other parameters than the first: {listed(apart)}.\n"
            f"Their rows have no columns in common to be multiplied. Pass the same params= to both."
        )
