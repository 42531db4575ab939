"""The Jacobian of a group whose rows are all in this process."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.jacobian._backwards import ONE, Backwards
from posegrad.jacobian._block import Block, join
from posegrad.jacobian._deliver import Gradient, check_delivered, deliver_step, gradient_of
from posegrad.jacobian._directions import Directions
from posegrad.jacobian._exchange import packed
from posegrad.jacobian._iterate import one_at
from posegrad.jacobian._parts import Weights, checked_weights
from posegrad.jacobian._precision import exact, wide
from posegrad.jacobian._products import Products, added, inner_products, squared_norms
from posegrad.jacobian._projection import Projection
from posegrad.jacobian._range import left_range, products_left_range
from posegrad.jacobian._report import kept_bytes, report
from posegrad.jacobian._sheet import side_by_side
from posegrad.jacobian.base import Jacobian, check_columns
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["PoseJacobian"]

_MIXED = ("poses mix", "a few numbers put together", "no closed form for this layout")
"""Parts of the paths on which poses may mix. In this order: poses influence each other; nobody has
checked; one row of an activation has numbers of several poses, as after a sort of each column."""


@final
class PoseJacobian(Jacobian):
    """The Jacobian of a group whose rows are all in this process.

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
        self._working = dict(blocks)  # products may join uses here, or replace factors by rows
        self._backwards = backwards

    @classmethod
    def empty(cls, output: Tensor, parameters: Mapping[str, Tensor]) -> "PoseJacobian":
        """The Jacobian of an output without rows; it is like `output` except in dimension 0."""
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
        join(blocks)  # at once, so that nothing is held twice
        backwards = reduce(Backwards.joined, [jacobian._backwards for jacobian in jacobians])
        return cls(predictions, first._parameters, blocks, backwards)

    def beside(
        self, tensors: Mapping[str, Tensor], blocks: Mapping[str, Block], backwards: Backwards
    ) -> "PoseJacobian":
        """The same rows with additional columns, by other tensors."""
        return PoseJacobian(
            self.predictions,
            {**self._parameters, **tensors},
            {**self._blocks, **blocks},
            self._backwards.joined(backwards),
        )

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The blocks by parameter, as they are held."""
        return self._blocks

    def release(self, names: Sequence[str]) -> None:
        if self._blocks is self._working:  # it is consumed
            self._working |= {name: replace(self._working[name], parts=()) for name in names}

    def consumed(self) -> "PoseJacobian":
        self._blocks = self._working
        return self

    def in_form(self, form: str) -> "PoseJacobian":
        """The same rows as `"factors"`, `"dense"`, or in the smaller form of each block."""
        if form == "factors":
            return self
        own, auto = self._blocks.items(), form == "auto"
        blocks = {name: block.smaller() if auto else block.dense() for name, block in own}
        return self._with(self.predictions, blocks)

    @property
    def used(self) -> list[str]:
        return [name for name, block in self._blocks.items() if block.parts]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: block.shape for name, block in self._blocks.items()}

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self._parameters.values())
        return f"PoseJacobian(output_shape={list(self.output_shape)}, parameters={count})"

    @exact
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        join(self._working)
        flat = Weights(checked_weights(weights, self.output_shape).to(self._device).reshape(-1))
        # A bias before its weight: the weight's product sweeps the cotangents that both need out of
        # the processor's cache.
        found = {name: self._working[name].combine(flat) for name in reversed(self._working)}
        return {name: found[name] for name in self._working}

    def _gradient(self, index: Any) -> dict[str, Tensor]:
        weights = one_at(index, self.predictions)
        if not weights.ndim:
            return self.combine(weights)
        entry = weights.flatten(1).any(1).nonzero()[0] if weights.ndim > 1 else weights.nonzero()[0]
        # Only its own rows: zero times the nan of another pose is nan.
        return self._picked(entry).combine(weights[entry])

    def backward(
        self, rule: Tensor | AnyRule, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor | None:
        check_delivered(self._parameters)
        return deliver_step(as_gradient_rule(rule), self, self._parameters, scaler)

    @restoring
    def made_by(self, rule: Tensor | AnyRule, *, or_nan: bool = False) -> Gradient:
        return gradient_of(as_gradient_rule(rule), self, or_nan=or_nan)

    @exact
    def block(self, name: str) -> Tensor:
        if name not in self._blocks:
            raise KeyError(
                f"There is no trainable parameter {name!r}; there are "
                f"{', '.join(self._blocks) or 'none'}."
            )
        rows = self._matrix_of(name).to(self._blocks[name].dtype)
        block = self._working[name]
        if any(_share(rows, held) for part in block.parts for held in part.held()):
            rows = rows.clone()  # the caller may write to it
        return rows.reshape((*self.output_shape, *block.shape))

    @exact
    def matrix(self) -> Tensor:
        count = self.predictions.numel()
        widths = [block.shape.numel() for block in self._blocks.values()]
        dtype = reduce(torch.promote_types, self._dtypes) if widths else torch.float32
        matrix = torch.empty(count, sum(widths), dtype=dtype, device=self._device)
        columns = torch.split(matrix, widths, dim=1)
        for part, block in zip(columns, self._working.values(), strict=True):
            block.write(part)
        return matrix

    def to(self, device: torch.device | str) -> "PoseJacobian":
        blocks = {name: block.to(device) for name, block in self._blocks.items()}
        return self._with(self.predictions.to(device), blocks)

    def report(self) -> str:
        return report(self.predictions.numel(), self._blocks, self._backwards)

    def packed(self) -> bytes:
        """The rows in the form in which they are sent to other processes."""
        return packed((self.predictions.cpu(), {n: b.to("cpu") for n, b in self._blocks.items()}))

    @classmethod
    def unpacked(cls, found: bytes, parameters: Mapping[str, Tensor]) -> "PoseJacobian":
        """Reads what another process packed, for the same parameters here."""
        predictions, blocks = pickle.loads(found)
        device = next(iter(parameters.values())).device
        return cls(predictions, parameters, blocks).to(device)

    @property
    def held_bytes(self) -> int:
        """The memory that it keeps alive; what parameters share counts once."""
        return kept_bytes(self._blocks)

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """The paths by which each parameter's rows were read; empty for unused parameters."""
        return {
            name: tuple(part.path for part in block.parts) for name, block in self._blocks.items()
        }

    @property
    def mixed(self) -> list[str]:
        own = {name: " ".join(paths) for name, paths in self.paths.items()}
        return [name for name, path in own.items() if any(sign in path for sign in _MIXED)]

    def of(self, names: Sequence[str]) -> "PoseJacobian":
        parameters = {name: self._parameters[name] for name in names}
        blocks = {name: self._blocks[name] for name in names}
        return PoseJacobian(self.predictions, parameters, blocks, self._backwards)

    @property
    def _device(self) -> torch.device:
        return self.predictions.device

    @property
    def _dtypes(self) -> list[torch.dtype]:
        return [block.dtype for block in self._blocks.values()]

    def _zeros(self, *shape: int) -> Tensor:
        """Products with rows that depend on no parameter."""
        return torch.zeros(shape, dtype=self._kind, device=self._device)

    def _with(self, predictions: Tensor, blocks: Mapping[str, Block]) -> "PoseJacobian":
        """A Jacobian of other rows by the same parameters."""
        return PoseJacobian(predictions, self._parameters, blocks, self._backwards)

    def double(self) -> "PoseJacobian":
        """The same rows in float64."""
        blocks = {name: block.double() for name, block in self._blocks.items()}
        return self._with(self.predictions, blocks)

    @exact
    def _moved(self, directions: object) -> Tensor:
        found = Directions.of(directions, self.shapes)
        join(self._working)
        own = (
            self._working[name].along(direction)
            for name, direction in found.by_name.items()
            if self._working[name].parts and found.columns
        )
        total = added(own, self._device)
        if total is None:
            total = self._zeros(self.predictions.numel(), found.columns)
        shape = self.output_shape if found.is_one else (*self.output_shape, total.shape[1])
        return total.reshape(shape)

    @exact
    def _met(self, other: Jacobian) -> Tensor:
        check_columns(self, other, "The other Jacobian")
        assert isinstance(other, PoseJacobian)
        if other is self:
            return self._gram(None)
        join(self._working)
        join(other._working)
        products = Products()
        used = [name for name in self.used if other._blocks[name].parts]
        own = (self._met_of(name, other, products) for name in used)
        total = added(own, self._device)
        if total is None:
            return self._zeros(self.predictions.numel(), other.predictions.numel())

        def norms() -> tuple[Tensor, Tensor]:
            return self._norms().reshape(-1), other._norms().reshape(-1)

        both = [self._working[name] for name in used], [other._working[name] for name in used]
        if products_left_range(total, both, norms):
            return self.double()._met(other.double()).to(total)
        return total

    def _met_of(self, name: str, other: "PoseJacobian", products: Products) -> Tensor:
        """The inner products of one parameter's rows with another's, `[M, M']`."""
        gram = self._working[name].across(other._working[name], products)
        if gram is not None:
            return gram
        left, right = self._matrix_of(name), other._matrix_of(name)
        dtype = torch.promote_types(left.dtype, right.dtype)
        return left.to(dtype) @ right.to(left.device, dtype).mT

    @exact
    def _gram(self, dtype: torch.dtype | None) -> Tensor:
        join(self._working)
        sheets, names = side_by_side({name: self._working[name] for name in self.used})
        products = Products()
        # By name, since rows may replace factors, which are then freed on the way.
        grams = (self._gramian_of(name, products, dtype) for name in names)
        small = (_products_of(sheet, dtype) for sheet in sheets)
        total = added(chain(grams, small), self._device)
        if total is not None:
            if left_range(total.diagonal(), self._working.values()):
                return self._gram_in_double().to(total)
            return total
        count = self.predictions.numel()
        return self._zeros(count, count).to(dtype or self._kind)

    @exact
    def _grams(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        join(self._working)
        products = Products()
        found = {}
        for name in list(self._working):
            gram = self._gramian_of(name, products, dtype)
            if left_range(gram.diagonal(), [self._working[name]]):
                found[name] = self.of([name])._gram_in_double().to(gram)
            else:
                found[name] = gram.clone()  # several may share one
        return found

    def _gram_in_double(self) -> Tensor:
        return self.double().consumed()._gram(torch.float64)

    @exact
    def _norms(self) -> Tensor:
        join(self._working)
        products = Products()
        sheets, names = side_by_side({name: self._working[name] for name in self.used})
        squares = (self._squares_of(name, products) for name in names)
        total = added(chain(squares, map(squared_norms, sheets)), self._device)
        if total is None:
            return self._zeros(*self.output_shape)
        if left_range(total, self._working.values()):
            return self.double()._norms().to(total)
        return total.sqrt().reshape(self.output_shape)

    def _norms_of_each(self) -> dict[str, Tensor]:
        return {name: self.of([name])._norms() for name in self._blocks}

    @exact
    def _projected(self, k: int, seed: int) -> Tensor:
        join(self._working)
        total = added(self._projections(k, seed), self._device)
        return self._zeros(self.predictions.numel(), k) if total is None else total

    def _projections(self, k: int, seed: int) -> Iterator[Tensor]:
        for name in self.used:
            block = self._working[name]
            like = wide(torch.empty(0, dtype=block.dtype, device=block.device))
            yield block.projected(Projection(k, seed, name, like))

    @exact
    def _picked(self, index: Tensor) -> "PoseJacobian":
        join(self._working)
        index = index.to(self._device)
        inner = self.output_shape[1:].numel()
        blocks = {name: block.picked(index, inner) for name, block in self._working.items()}
        return self._with(self.predictions[index], blocks)

    def _followed(self, others: Sequence[Jacobian]) -> "PoseJacobian":
        own = [self, *(other for other in others if isinstance(other, PoseJacobian))]
        return PoseJacobian.joined(own)

    def _gramian_of(self, name: str, products: Products, dtype: torch.dtype | None) -> Tensor:
        """The inner products of one parameter's rows, `[M, M]`, the cheaper way."""
        gram = self._working[name].pairs(products)
        if gram is None:
            gram = _products_of(self._matrix_of(name), dtype)
        return gram if dtype is None else gram.to(dtype)

    def _squares_of(self, name: str, products: Products) -> Tensor:
        """The squared norms of one parameter's rows, `[M]`, the cheaper way."""
        squares = self._working[name].squares(products)
        if squares is None:
            squares = squared_norms(self._matrix_of(name))
        return squares

    def _matrix_of(self, name: str) -> Tensor:
        """One parameter's rows `[M, n]`; kept for other products, unless factors are far smaller.

        A product takes one multiplication for each number of the rows, or, with factors, for each
        number and every row of a pose's activations.
        """
        block = self._working[name]
        rows = block.rows()
        if not block.is_plain() and rows.numel() * rows.element_size() <= 2 * block.bytes():
            self._working[name] = block.held_as(rows)
        return rows.reshape(block.count, block.shape.numel())


def _products_of(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    return inner_products(rows if dtype is None else rows.to(dtype))


def _share(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
