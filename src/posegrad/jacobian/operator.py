"""The Jacobian of a group of predictions, as a linear operator."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.jacobian._backwards import ONE, Backwards
from posegrad.jacobian._block import Block, join
from posegrad.jacobian._deliver import Gradient, deliver_step, gradient_of
from posegrad.jacobian._iterate import each, one_at
from posegrad.jacobian._parts import Weights, checked_weights
from posegrad.jacobian._precision import exact
from posegrad.jacobian._products import Products, added, generalized, inner_products
from posegrad.jacobian._range import left_range
from posegrad.jacobian._report import report
from posegrad.jacobian._sheet import side_by_side
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["PoseJacobian"]

MIXED = "poses mix"  # in the path of a parameter's rows


@final
class PoseJacobian:
    r"""The rows :math:`\partial \hat y_i / \partial \theta` of a group, held in factors.

    Row i of the Jacobian J `[M, n]` is the gradient of one number of the output by all n
    parameters. J is never formed unless asked for: for most layers, their input and the cotangent
    of their output are held, from which products with J are taken.
    Made by `Engine.jacobian` and `Engine.gather`. Immutable; keeps no graph of the model.

    Attributes:
        predictions: The output, of `output_shape`, detached.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))  # of two poses
        >>> J.matrix()  # columns: two of the weight, one of the bias
        tensor([[1., 0., 1.],
                [0., 1., 1.]])
        >>> J.gramian()
        tensor([[2., 1.],
                [1., 2.]])
        >>> J.norms()
        tensor([1.4142, 1.4142])
        >>> J[0]
        {'weight': tensor([[1., 0.]]), 'bias': tensor([1.])}
        >>> J.block("weight").shape
        torch.Size([2, 1, 2])
    """

    def __init__(
        self,
        predictions: Tensor,
        parameters: Mapping[str, Tensor],
        blocks: Mapping[str, Block],
        backwards: Backwards = ONE,
    ) -> None:
        self.predictions = predictions
        self._parameters = dict(parameters)
        self._blocks = dict(blocks)
        self._backwards = backwards

    @classmethod
    def empty(cls, output: Tensor, parameters: Mapping[str, Tensor]) -> "PoseJacobian":
        """The rows of an output that has none; it is like `output` in all but dimension 0."""
        blocks = {name: Block.of(p, 0, ()) for name, p in parameters.items()}
        return cls(output.detach()[:0], parameters, blocks)

    @classmethod
    def joined(cls, jacobians: Sequence["PoseJacobian"]) -> "PoseJacobian":
        """The rows of several Jacobians of the same parameters, one after another."""
        predictions = torch.cat([jacobian.predictions for jacobian in jacobians])
        first = jacobians[0]
        blocks = {
            name: Block.joined([jacobian._blocks[name] for jacobian in jacobians])
            for name in first._blocks
        }
        backwards = reduce(Backwards.joined, [jacobian._backwards for jacobian in jacobians])
        return cls(predictions, first._parameters, blocks, backwards)

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The blocks by parameter, as they are held."""
        return self._blocks

    def in_form(self, form: str) -> "PoseJacobian":
        """The same rows as `"factors"`, `"dense"`, or in the smaller form of each block."""
        if form == "factors":
            return self
        own, auto = self._blocks.items(), form == "auto"
        blocks = {name: block.smaller() if auto else block.dense() for name, block in own}
        return PoseJacobian(self.predictions, self._parameters, blocks, self._backwards)

    @property
    def used(self) -> list[str]:
        """The parameters that the predictions depend on."""
        return [name for name, block in self._blocks.items() if block.parts]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' shapes, in the order of the columns of `matrix`."""
        return {name: block.shape for name, block in self._blocks.items()}

    @property
    def mixed(self) -> list[str]:
        """The parameters on whose way to the output poses were seen to influence each other."""
        return [name for name, paths in self.paths.items() if any(MIXED in p for p in paths)]

    def of(self, names: Sequence[str]) -> "PoseJacobian":
        """The rows of some parameters alone; it shares what this Jacobian holds."""
        parameters = {name: self._parameters[name] for name in names}
        blocks = {name: self._blocks[name] for name in names}
        return PoseJacobian(self.predictions, parameters, blocks, self._backwards)

    @property
    def output_shape(self) -> torch.Size:
        """The shape of the predictions; it has M elements."""
        return self.predictions.shape

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self._parameters.values())
        return f"PoseJacobian(output_shape={list(self.output_shape)}, parameters={count})"

    @exact
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        r"""The product :math:`w^\top J`: one gradient, shaped and named like the parameters.

        Args:
            weights: Of `output_shape`; w, one weight for each number of the output.

        Returns:
            An entry for every trainable parameter, in the order of `named_parameters()`; zeros for
            those the output does not depend on.

        Raises:
            ShapeMismatchError: if the weights have another shape.
            StaleFactorError: if a tensor the forward saved was changed in place since.

        Note:
            Time: half a plain backward, from factors; no graph is needed.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J.combine(torch.tensor([1.0, 10.0]))
            {'weight': tensor([[ 1., 10.]]), 'bias': tensor([11.])}
        """
        join(self._blocks)
        flat = Weights(checked_weights(weights, self.output_shape).to(self._device).reshape(-1))
        # Backwards: a bias before its weight, whose product sweeps from the processor's cache the
        # cotangents that both need.
        found = {name: self._blocks[name].combine(flat) for name in reversed(self._blocks)}
        return {name: found[name] for name in self._blocks}

    def backward(
        self, rule: Tensor | AnyRule, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor | None:
        r"""Adds the gradient a rule makes of J to the `.grad` of the parameters.

        Args:
            rule: The weights w of `output_shape`, for :math:`w^\top J`; a `Weighting` of the
                Gramian; an `Aggregation` of the rows, parameter by parameter; a weighting or an
                aggregator of TorchJD's; or a combination rule h, for which
                :math:`w = \partial h(\hat y) / \partial \hat y`; its own parameters get theirs.
            scaler: If `scaler.step` comes next: the gradient is multiplied by the scale that it
                divides by, and is nan, so that it skips the step, if rows are nan or infinite.

        Returns:
            w, or None if the rule has no weights; nan where rows are nan or infinite.

        Raises:
            ShapeMismatchError: if w has another shape, or the rule gives more than one number.
            NonFiniteGradientError: if such rows meet a rule that looks at them, without a scaler.
            StaleFactorError: as for `combine`. No `.grad` is touched by any of these.

        Note:
            Time: what the rule looks at, then `combine`. Hooks on the parameters run, once. Where
            autograd would leave `.grad` None, so does it.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> J = Engine(model).jacobian(model(torch.eye(2)).squeeze(1))
            >>> J.backward(Mean())
            tensor([0.5000, 0.5000])
            >>> model.weight.grad
            tensor([[0.5000, 0.5000]])
        """
        return deliver_step(as_gradient_rule(rule), self, self._parameters, scaler)

    @restoring
    def made_by(self, rule: Tensor | AnyRule, *, or_nan: bool = False) -> Gradient:
        """The gradient that `backward` would add to `.grad`, and the weights.

        Args:
            rule: As there.
            or_nan: Whether rows that are nan or infinite give a gradient of nan, not an error.
        """
        return gradient_of(as_gradient_rule(rule), self, or_nan=or_nan)

    @exact
    def gramian(self, dtype: torch.dtype | None = None, *, per_parameter: bool = False) -> Any:
        r"""The inner products of the rows, :math:`G = J J^\top`.

        Args:
            dtype: Of the result and the sums; default: that of the parameters, float32 at least.
            per_parameter: Return one Gramian for each parameter instead of their sum.

        Returns:
            G, of shape `output_shape + reversed(output_shape)`, which for `[m]` is `[m, m]`; or a
            dict of those, by parameter.

        Note:
            Time and memory, for R rows of a linear layer of d inputs and p outputs: the lesser of
            `R^2 (d + p)`, without any gradient, and `(R + M^2) d p`, with rows, as other layers;
            of rows each of the M d p numbers is also written and read. Kernels likewise, with
            positions for rows.

        References:
            Goodfellow, "Efficient per-example gradient computations" (2015), for one row a pose;
            Rochette et al. (2019) for convolutions.
        """
        join(self._blocks)
        used = [self._blocks[name] for name in self.used]
        sheet = None if per_parameter else side_by_side(used)
        if sheet is not None:
            gram = inner_products(sheet if dtype is None else sheet.to(dtype))
            return generalized(gram, self.output_shape)
        products = Products()
        grams = {
            name: self._gramian_of(name, products, dtype)
            for name in list(self._blocks)  # names alone: blocks are freed on the way
            if self._blocks[name].parts or per_parameter
        }
        if per_parameter:
            own = {name: gram.clone() for name, gram in grams.items()}  # some have one in common
            return {name: generalized(gram, self.output_shape) for name, gram in own.items()}
        total = added(grams.values(), self._device)
        if total is None:
            count = self.predictions.numel()
            total = torch.zeros(count, count, dtype=dtype, device=self._device)
        return generalized(total, self.output_shape)

    @exact
    def norms(self) -> Tensor:
        """The Euclidean norm of every row, in `output_shape`.

        Note:
            Time: for a linear layer with T rows a pose, or a kernel with T positions, the lesser of
            `m T^2 (d + p)`, without any gradient, and of its rows; for tables what was looked up;
            for other layers their rows.

        References:
            Goodfellow (2015), as for `gramian`, for T = 1; Li et al., "Large language models can
            be strong differentially private learners", ICLR 2022.
        """
        join(self._blocks)
        products = Products()
        sheet = side_by_side([self._blocks[name] for name in self.used])
        if sheet is not None:
            total: Tensor | None = torch.linalg.vector_norm(sheet, dim=1).square()
        else:
            total = added((self._squares_of(name, products) for name in self.used), self._device)
        if total is None:
            return torch.zeros(self.output_shape, device=self._device)
        if left_range(total, self._blocks.values()):
            blocks = {name: block.double() for name, block in self._blocks.items()}
            return PoseJacobian(self.predictions, self._parameters, blocks).norms().to(total)
        return total.sqrt().reshape(self.output_shape)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """The gradient of one number of the output, by parameter; takes one `combine`.

        Args:
            index: As into a tensor of `output_shape`; must pick one number.

        Raises:
            IndexError: if it is out of range or picks several.
        """
        return self.combine(one_at(index, self.predictions))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """For each index of the first dimension its rows; takes a `combine` for each of these."""
        return each(self.output_shape, self.__getitem__)

    @exact
    def block(self, name: str) -> Tensor:
        """The rows of one parameter, `[*output_shape, *parameter.shape]`; memory: these numbers.

        Raises:
            KeyError: if no trainable parameter has that name.
        """
        if name not in self._blocks:
            raise KeyError(
                f"There is no trainable parameter {name!r}; there are "
                f"{', '.join(self._blocks) or 'none'}."
            )
        rows = self._matrix_of(name).to(self._blocks[name].dtype)
        block = self._blocks[name]
        if any(_share(rows, held) for part in block.parts for held in part.held()):
            rows = rows.clone()  # the caller's to write to
        return rows.reshape((*self.output_shape, *block.shape))

    @exact
    def matrix(self) -> Tensor:
        """J as a matrix `[M, n]`, columns in the order of `named_parameters()`.

        Memory: M n numbers, once.
        """
        count = self.predictions.numel()
        widths = [block.shape.numel() for block in self._blocks.values()]
        dtypes = [block.dtype for block in self._blocks.values()]
        dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        matrix = torch.empty(count, sum(widths), dtype=dtype, device=self._device)
        columns = torch.split(matrix, widths, dim=1)
        for part, block in zip(columns, self._blocks.values(), strict=True):
            block.write(part)
        return matrix

    def to(self, device: torch.device | str) -> "PoseJacobian":
        """The Jacobian on another device; `backward` still serves the parameters where they are."""
        blocks = {name: block.to(device) for name, block in self._blocks.items()}
        return PoseJacobian(self.predictions.to(device), self._parameters, blocks, self._backwards)

    def report(self) -> str:
        """How many backwards J took, and by which path each parameter's rows came; if slow, why.

        Four or more parameters that differ in the number of their layer and in nothing else are one
        line. What parameters have in common counts once in the first line, in full for `each`.

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
        return report(self.predictions.numel(), self._blocks, self._backwards)

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """The rungs each parameter's parts came by; empty for unused parameters."""
        return {
            name: tuple(part.path for part in block.parts) for name, block in self._blocks.items()
        }

    @property
    def _device(self) -> torch.device:
        return self.predictions.device

    def _gramian_of(self, name: str, products: Products, dtype: torch.dtype | None) -> Tensor:
        """The inner products of one parameter's rows, `[M, M]`, by the cheaper of two ways."""
        gram = self._blocks[name].pairs(products)
        if gram is None:
            rows = self._matrix_of(name)
            gram = inner_products(rows if dtype is None else rows.to(dtype))
        return gram if dtype is None else gram.to(dtype)

    def _squares_of(self, name: str, products: Products) -> Tensor:
        """The squared norms of one parameter's rows, `[M]`, by the cheaper of two ways."""
        squares = self._blocks[name].squares(products)
        if squares is None:
            squares = torch.linalg.vector_norm(self._matrix_of(name), dim=1).square()
        return squares

    def _matrix_of(self, name: str) -> Tensor:
        """One parameter's rows `[M, n]`; kept instead of the factors, unless these are far smaller.

        A product with rows costs one multiplication for each of their numbers, with factors one
        for each of them and every row of the activations of a pose.
        """
        block = self._blocks[name]
        dense = block.as_rows()
        if dense.bytes() <= 2 * block.bytes():
            self._blocks[name] = dense
        return dense.matrix()


def _share(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
