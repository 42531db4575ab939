r"""The Jacobian of a group whose poses are spread over ranks.

Each rank holds the rows of its own poses. A product with weights is a sum over ranks. The Gramian
needs every row beside every other, but one layer is enough at a time:

.. math::
    G = \sum_l J_l J_l^\top .

So the rows of one layer, in the form they are held in, go to one rank, those of the next layer to
the next rank, and what each has made of them is added up. No rank ever has the whole of J.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor

from posegrad.errors import (
    NoPosesError,
    RankError,
    ShapeMismatchError,
    UnsupportedModuleError,
)
from posegrad.jacobian._block import Block
from posegrad.jacobian._deliver import deposit, step_of
from posegrad.jacobian._parts import one_at
from posegrad.jacobian._precision import wide
from posegrad.jacobian.operator import PoseJacobian
from posegrad.ranks import Ranks
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["SharedJacobian", "of_all"]

Grams = dict[str, Tensor]


@final
class SharedJacobian:
    r"""The rows :math:`\partial \hat y_i / \partial \theta` of a group that several ranks score.

    It is to all ranks what `PoseJacobian` is to one process: predictions, weights, norms and
    Gramians are those of all rows, in the order of the ranks. All ranks call its methods together,
    in the same order, and each has the same result. A rank without poses calls them too.

    Made by `Engine.jacobian` and `Engine.gather` of an engine with a process group.

    Args:
        make: Makes the rows of this rank; raises NoPosesError if it has no poses.
        parameters: By name.
        ranks: Who share the group.

    Raises:
        NoPosesError: if no rank has poses.
        ShapeMismatchError: if ranks disagree in the shape of a row.
        RankError: if another rank failed.
    """

    def __init__(
        self,
        make: Callable[[], PoseJacobian],
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
    ) -> None:
        made: list[PoseJacobian] = []

        def told() -> tuple[Tensor, list[str]] | None:
            try:
                own = make()
            except NoPosesError:
                return None
            made.append(own)
            return own.predictions.cpu(), own.used

        everyone = ranks.together("read a Jacobian", told)
        present = [one for one in everyone if one is not None]
        _check_alike([predictions for predictions, _ in present])
        start = sum(len(one[0]) for one in everyone[: ranks.own] if one is not None)
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.predictions = torch.cat([predictions for predictions, _ in present]).to(device)
        self._parameters = dict(parameters)
        self._ranks = ranks
        self._own = made[0] if made else self._empty()
        self._rows = slice(start, start + len(self._own))
        used = {name for _, names in present for name in names}
        self.used = [name for name in parameters if name in used]

    @property
    def own(self) -> PoseJacobian:
        """The rows of this rank."""
        return self._own

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' shapes, in the order of the columns of `matrix`."""
        return self._own.shapes

    @property
    def output_shape(self) -> torch.Size:
        """The shape of all ranks' predictions; it has M elements."""
        return self.predictions.shape

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        own, shape = len(self._own), list(self.output_shape)
        return f"SharedJacobian(output_shape={shape}, own_rows={own}, ranks={self._ranks.count})"

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        r"""The product :math:`w^\top J` with the rows of all ranks.

        Args:
            weights: Of `output_shape`. Those of the first rank count, should others differ.

        Returns:
            As `PoseJacobian.combine`, the same on every rank.

        Raises:
            ShapeMismatchError, StaleFactorError: as there.
            RankError: if another rank failed.

        Note:
            Each rank multiplies its own rows; the results, of parameter size, are summed once.
        """
        first = self._ranks.together("combine rows", lambda: self._checked(weights).cpu())[0]
        own: dict[str, Tensor] = {}

        def work() -> list[bool]:
            own.update(self._own.combine(first[self._rows].to(self.predictions.device)))
            return [name in self._own.used for name in own]

        has = self._ranks.together("multiply rows", work)
        sums = self._ranks.sum(list(own.values()), has, list(self._parameters.values()))
        pairs = zip(own.items(), sums, strict=True)
        return {name: mine if total is None else total for (name, mine), total in pairs}

    def backward(
        self, rule: Tensor | AnyRule, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor | None:
        """Adds the gradient a rule makes of all ranks' rows to `.grad`, the same on every rank.

        Args:
            rule: As for `PoseJacobian.backward`.
            scaler: As there.

        Returns:
            The weights, of `output_shape`; None if the rule has none.

        Raises:
            RankError: if another rank failed, or a rule that draws random numbers of its own made
                different gradients on different ranks; no `.grad` is touched.
        """
        gradients, weights = step_of(as_gradient_rule(rule), self, scaler)
        self._check_same(gradients)
        deposit(gradients, self._parameters)
        return weights

    def gramian(self, dtype: torch.dtype | None = None, *, per_parameter: bool = False) -> Any:
        """The inner products of all rows, on every rank; as `PoseJacobian.gramian`.

        Note:
            Memory: of one layer the rows of all ranks, in the form they are held in or as that
            product needs them. Every row travels once.
        """
        names = [name for name in self.shapes if name in self.used or per_parameter]
        grams: Grams = {}
        failure: Exception | None = None
        for number, layer in enumerate(_layers(names)):
            to = number % self._ranks.count
            try:
                packed = _packed({name: self._own.blocks[name].to("cpu") for name in layer})
            except Exception as error:  # told to the others below: they wait for this one's rows
                packed, failure = b"", failure or error
            found = self._ranks.sent(packed, to)
            if found and all(found):
                try:
                    grams |= self._of_layer(layer, found, dtype)
                except Exception as error:
                    failure = failure or error

        def finished() -> None:
            if failure is not None:
                raise failure

        self._ranks.together("multiply rows with rows", finished)
        return self._summed(grams, names, dtype, per_parameter=per_parameter)

    def norms(self) -> Tensor:
        """The Euclidean norm of every row, of `output_shape`; each rank computes its own."""
        everyone = self._ranks.together("norms", lambda: self._own.norms().cpu())
        return torch.cat([n for n in everyone if n.numel()]).to(self.predictions.device)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """The gradient of one number of the output; as `PoseJacobian.__getitem__`."""
        return self.combine(one_at(index, self.predictions))

    def block(self, name: str) -> Tensor:
        """The rows of one parameter, `[*output_shape, *parameter.shape]`, on every rank."""
        everyone = self._ranks.together(f"rows of {name}", lambda: self._own.block(name).cpu())
        whole = torch.cat([rows for rows in everyone if len(rows)])
        return whole.to(self.predictions.device)

    def matrix(self) -> Tensor:
        """J as a matrix `[M, n]`, on every rank. Memory: M n numbers; no other method takes it."""
        everyone = self._ranks.together("matrix", lambda: self._own.matrix().cpu())
        return torch.cat(everyone).to(self.predictions.device)

    def report(self) -> str:
        """How this rank holds each parameter's block."""
        return self._own.report()

    def _empty(self) -> PoseJacobian:
        """The rows of a rank without poses."""
        blocks = {name: Block.of(p, 0, ()) for name, p in self._parameters.items()}
        return PoseJacobian(self.predictions[:0], self._parameters, blocks)

    def _of_layer(self, names: list[str], found: list[bytes], dtype: torch.dtype | None) -> Grams:
        """The Gramians of one layer's parameters, from the rows of all ranks."""
        parts = [pickle.loads(packed) for packed in found]
        device = self.predictions.device
        blocks = {n: Block.joined([part[n] for part in parts]).to(device) for n in names}
        own = {name: self._parameters[name] for name in names}
        whole = PoseJacobian(self.predictions, own, blocks)
        return dict(whole.gramian(dtype, per_parameter=True))

    def _summed(
        self, grams: Grams, names: list[str], dtype: torch.dtype | None, *, per_parameter: bool
    ) -> Any:
        """The Gramians of layers, wherever they were computed, added up."""
        shape = (*self.output_shape, *reversed(self.output_shape))
        kinds = [
            wide(torch.empty(0, dtype=p.dtype, device="cpu")).dtype
            for p in self._parameters.values()
        ]
        kind = dtype or max(kinds, key=lambda one: one.itemsize, default=torch.float32)

        def added(own: Sequence[Tensor]) -> Tensor:
            total = torch.zeros(shape, dtype=kind, device=self.predictions.device)
            for gram in own:
                total += gram
            return self._ranks.added(total)

        if per_parameter:
            return {name: added([grams[name]] if name in grams else []) for name in names}
        return added(list(grams.values()))

    def _checked(self, weights: Tensor) -> Tensor:
        if weights.shape != self.output_shape:
            raise ShapeMismatchError(
                f"The weights have shape {list(weights.shape)}, the output of all ranks "
                f"{list(self.output_shape)}; there must be one weight for each of its numbers.\n"
                f"Pass the weights of all ranks' rows, in the order of the ranks."
            )
        return weights.detach()

    def _check_same(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuses gradients that ranks do not agree on: the models would drift apart."""
        total = sum((float(g.double().sum()) for g in gradients.values()), 0.0)
        size = sum((float(g.double().abs().sum()) for g in gradients.values()), 0.0)
        found = self._ranks.together("compare gradients", lambda: (total, size))
        bound = 1e-5 * max(size for _, size in found)
        if any(abs(other - found[0][0]) > bound for other, _ in found):
            raise RankError(
                f"The rule made different gradients of the same rows on different ranks: their "
                f"sums are {[total for total, _ in found]}.\n"
                f"It draws random numbers, or has a state, of its own on each rank, and the ranks' "
                f"parameters would drift apart; no .grad was touched.\n"
                f"Seed the rule's generator alike on all ranks."
            )


def of_all(
    make: Callable[[], PoseJacobian], parameters: Mapping[str, Tensor], ranks: Ranks | None
) -> PoseJacobian | SharedJacobian:
    """The Jacobian of all poses, be they of this process or of several ranks.

    Raises:
        UnsupportedModuleError: if FSDP2 has sharded the parameters.
    """
    if ranks is not None and ranks.sharded:
        raise UnsupportedModuleError(
            "The model is sharded by fully_shard, whose parameters are not in the graph: only its "
            "own backward() finds them, and gives no rows.\n"
            "Use combine() with a rule of the predictions, or wrap the model by "
            "DistributedDataParallel for rules that look at gradients."
        )
    return make() if ranks is None else SharedJacobian(make, parameters, ranks)


def _layers(names: Sequence[str]) -> Iterator[list[str]]:
    """The names of parameters, module by module: weight and bias have a cotangent in common."""
    for _, own in groupby(names, key=lambda name: name.rpartition(".")[0]):
        yield list(own)


class _Packer(pickle.Pickler):
    """Sends of a tensor what it shows, not all of the storage that it is a view of."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, Tensor):
            shown = found.numel() * found.element_size()
            if found.untyped_storage().nbytes() > shown:
                return found.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented


def _packed(blocks: Mapping[str, Block]) -> bytes:
    file = BytesIO()
    _Packer(file, pickle.HIGHEST_PROTOCOL).dump(blocks)
    return file.getvalue()


def _check_alike(predictions: Sequence[Tensor]) -> None:
    if not predictions:
        raise NoPosesError(
            "No rank has predictions: there is nothing to differentiate.\n"
            "Leave empty batches out of the loop, on all ranks."
        )
    kinds = [(tuple(one.shape[1:]), one.dtype) for one in predictions]
    if len(set(kinds)) > 1 or predictions[0].ndim == 0:
        raise ShapeMismatchError(
            f"The outputs of the ranks are {[list(one.shape) for one in predictions]} of "
            f"{[one.dtype for one in predictions]}; they are joined along dimension 0, which "
            f"counts poses, and must agree in the rest."
        )
