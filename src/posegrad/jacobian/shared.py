r"""The Jacobian of a group whose poses are spread over ranks.

Each rank holds the rows of its own poses. A product with weights is a sum over ranks. The Gramian
needs every row beside every other, but one layer is enough at a time:

.. math::
    G = \sum_l J_l J_l^\top .

So the rows of one layer, in the form they are held in, go to one rank, those of the next layer to
the next rank, and what each has made of them is added up. No rank ever has the whole of J.
"""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import (
    NoPosesError,
    RankError,
    UnsupportedModuleError,
)
from posegrad.jacobian._block import Block
from posegrad.jacobian._deliver import Gradient, deposit, gradient_of
from posegrad.jacobian._exchange import (
    check_alike,
    check_same,
    layers,
    made_of,
    packed,
)
from posegrad.jacobian._iterate import each, one_at
from posegrad.jacobian._parts import checked_weights
from posegrad.jacobian._precision import wide
from posegrad.jacobian.operator import PoseJacobian
from posegrad.ranks import Ranks
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["SharedJacobian", "check_whole", "of_all"]

Grams = dict[str, Tensor]


@final
class SharedJacobian:
    r"""The rows :math:`\partial \hat y_i / \partial \theta` of a group that several ranks score.

    It is to all ranks what `PoseJacobian` is to one process: predictions, weights, norms and
    Gramians are those of all rows, in the order of the ranks. All ranks call its methods together,
    in the same order, and each has the same result. A rank without poses calls them too.

    Made by `Engine.jacobian` and `Engine.gather` of an engine with a process group. Results have
    the shapes and units of `PoseJacobian`'s.

    Attributes:
        predictions: Those of all ranks, of `output_shape`, detached.
        used: The parameters that the predictions of any rank depend on.

    Args:
        make: Makes the rows of this rank by parameters; raises NoPosesError if it has no poses.
        trainable: Looks up the parameters by name.
        ranks: Who share the group.

    Raises:
        NoPosesError: if no rank has poses.
        ShapeMismatchError: if ranks disagree in the shape of a row.
        RankError: if another rank failed.

    Note:
        Memory: each rank holds its own rows. What travels is said at each method.

    Example:
        >>> from torch import distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Linear(2, 1)
        >>> engine = Engine(model, process_group=dist.group.WORLD)
        >>> J = engine.jacobian(model(torch.eye(2)).squeeze(1))
        >>> J, J.norms()
        (SharedJacobian(output_shape=[2], own_rows=2, ranks=1), tensor([1.4142, 1.4142]))
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        make: Callable[[Any], PoseJacobian],
        trainable: Callable[[], Mapping[str, Tensor]],
        ranks: Ranks,
    ) -> None:
        made: list[PoseJacobian] = []
        parameters: dict[str, Tensor] = {}

        def told() -> tuple[int, str, tuple[Tensor, list[str]] | None]:
            parameters.update(trainable())
            head = ranks.next_call(), ranks.fingerprint.of(parameters.items())
            try:
                own = make(parameters)
            except NoPosesError:
                return *head, None
            made.append(own)
            return *head, (own.predictions.cpu(), own.used)

        numbers, layouts, everyone = zip(*ranks.together("read a Jacobian", told), strict=True)
        if len(set(layouts)) > 1:
            raise RankError(
                f"The ranks differentiate by different parameters: {list(layouts)}.\n"
                f"Their gradients are added up, so the same must be trained, or named by params=, "
                f"on all."
            )
        ranks = ranks.in_call(numbers)
        present = [one for one in everyone if one is not None]
        check_alike([predictions for predictions, _ in present])
        start = sum(len(one[0]) for one in everyone[: ranks.own] if one is not None)
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.predictions = torch.cat([predictions for predictions, _ in present]).to(device)
        self._parameters = dict(parameters)
        self._ranks = ranks
        self._own = made[0] if made else PoseJacobian.empty(self.predictions, self._parameters)
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
    def mixed(self) -> list[str]:
        """The parameters on whose way to the output poses of this rank influence each other."""
        return self._own.mixed

    def of(self, names: Sequence[str]) -> "SharedJacobian":
        """The rows of some parameters alone; all ranks name the same."""
        part = copy.copy(self)
        part._own = self._own.of(names)
        part._parameters = {name: self._parameters[name] for name in names}
        part.used = [name for name in self.used if name in part._parameters]
        return part

    @property
    def output_shape(self) -> torch.Size:
        """The shape of all ranks' predictions; it has M elements."""
        return self.predictions.shape

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        own, shape = len(self._own), list(self.output_shape)
        return f"SharedJacobian(output_shape={shape}, own_rows={own}, ranks={self._ranks.count})"

    @restoring
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        r"""The product :math:`w^\top J` with the rows of all ranks.

        Args:
            weights: Of `output_shape`. Those of the first rank count, should others differ.

        Returns:
            As `PoseJacobian.combine`, the same on every rank.

        Raises:
            ShapeMismatchError: as there.
            StaleFactorError: likewise.
            RankError: if another rank failed.

        Note:
            Each rank multiplies its own rows; the results, of parameter size, are summed once.
        """
        whole = "the output of all ranks"
        return self._combined(lambda: checked_weights(weights, self.output_shape, whole))

    def _combined(self, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        first = self._ranks.together("combine rows", lambda: weights().cpu())[0]
        own: dict[str, Tensor] = {}

        def work() -> list[bool]:
            own.update(self._own.combine(first[self._rows].to(self.predictions.device)))
            return [name in self._own.used for name in own]

        has = self._ranks.together("multiply rows", work)
        held: list[Tensor | None] = list(own.values())
        own.clear()
        parameters = self._parameters
        sums = self._ranks.sum(held, has, list(parameters.values()))
        pairs = zip(parameters.items(), sums, strict=True)
        return {n: torch.zeros_like(p) if total is None else total for (n, p), total in pairs}

    @restoring
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
        found = self._made_by(rule, partial(gradient_of, scaler=scaler))
        deposit(found.own, self._parameters)
        deposit(found.of_rule, found.trained)
        return found.weights

    @restoring
    def made_by(self, rule: Tensor | AnyRule, *, or_nan: bool = False) -> Gradient:
        """The gradient that `backward` would add to `.grad`; as `PoseJacobian.made_by`."""
        return self._made_by(rule, partial(gradient_of, or_nan=or_nan))

    def _made_by(self, rule: Tensor | AnyRule, make: Callable[..., Gradient]) -> Gradient:
        """What every rank makes of the rows, once all know that it is the same."""
        found: list[Gradient] = []

        def applied() -> tuple[str, float, float, Tensor | None, Grams]:
            made = make(as_gradient_rule(rule), self)
            found.append(made)
            sums = [float(g.sum(dtype=torch.float64)) for g in made.own.values()]
            sizes = [float(g.abs().sum(dtype=torch.float64)) for g in made.own.values()]
            told = None if made.weights is None else made.weights.cpu()
            of_rule = {n: g.cpu() for n, g in made.of_rule.items()}
            return made_of(rule), sum(sums), sum(sizes), told, of_rule

        told = self._ranks.together("apply the rule", applied)
        check_same(*zip(*(one[:3] for one in told), strict=True))
        own, weights, _, trained = found.pop()
        means = {n: torch.stack([each[n] for *_, each in told]).mean(dim=0) for n in told[0][4]}
        first = told[0][3]
        weights = None if weights is None or first is None else first.to(weights.device)
        return Gradient(own, weights, means, trained)

    @restoring
    def gramian(self, dtype: torch.dtype | None = None, *, per_parameter: bool = False) -> Any:
        """The inner products of all rows, on every rank; as `PoseJacobian.gramian`.

        Note:
            Memory: of one layer the rows of all ranks, in the form they are held in or as that
            product needs them. Every row travels once.
        """
        names = [name for name in self.shapes if name in self.used or per_parameter]
        grams: Grams = {}
        failure: Exception | None = None
        for number, layer in enumerate(layers(names)):
            to = number % self._ranks.count
            try:
                sent = packed({name: self._own.blocks[name].to("cpu") for name in layer})
            except Exception as error:  # told to the others below: they wait for this one's rows
                sent, failure = b"", failure or error
            found = self._ranks.sent(sent, to)
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

    @restoring
    def norms(self) -> Tensor:
        """The Euclidean norm of every row, of `output_shape`; each rank computes its own."""
        everyone = self._ranks.together("norms", lambda: self._own.norms().cpu())
        return torch.cat([n for n in everyone if n.numel()]).to(self.predictions.device)

    @restoring
    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """The gradient of one number of the output; as `PoseJacobian.__getitem__`."""
        return self._combined(lambda: one_at(index, self.predictions))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rows of all ranks; as `PoseJacobian.__iter__`. All ranks iterate together."""
        return each(self.output_shape, self.__getitem__)

    @restoring
    def block(self, name: str) -> Tensor:
        """The rows of one parameter, `[*output_shape, *parameter.shape]`, on every rank."""
        everyone = self._ranks.together(f"rows of {name}", lambda: self._own.block(name).cpu())
        whole = torch.cat([rows for rows in everyone if len(rows)])
        return whole.to(self.predictions.device)

    @restoring
    def matrix(self) -> Tensor:
        """J as a matrix `[M, n]`, on every rank. Memory: M n numbers; no other method takes it."""
        everyone = self._ranks.together("matrix", lambda: self._own.matrix().cpu())
        return torch.cat(everyone).to(self.predictions.device)

    def report(self) -> str:
        """How this rank holds each parameter's block."""
        return self._own.report()

    def _of_layer(self, names: list[str], found: list[bytes], dtype: torch.dtype | None) -> Grams:
        """The Gramians of one layer's parameters, from the rows of all ranks."""
        parts = [pickle.loads(rows) for rows in found]
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
        kinds = {name: dtype or wide(p.new_empty(0)).dtype for name, p in self._parameters.items()}

        def added(own: Sequence[Tensor], kind: torch.dtype) -> Tensor:
            total = torch.zeros(shape, dtype=kind, device=self.predictions.device)
            for gram in own:
                total += gram
            return self._ranks.added(total)

        if per_parameter:
            return {n: added([grams[n]] if n in grams else [], kinds[n]) for n in names}
        widest = max(kinds.values(), key=lambda kind: kind.itemsize, default=torch.float32)
        return added(list(grams.values()), widest)


@restoring
def check_whole(ranks: Ranks | None) -> None:
    """Refuses parameters that are spread over ranks.

    Raises:
        UnsupportedModuleError: if FSDP2 has sharded them.
    """
    if ranks is not None and ranks.sharded:
        raise UnsupportedModuleError(
            "The model is sharded by fully_shard, whose parameters are not in the graph: only its "
            "own backward() finds them, and gives no rows.\n"
            "Use combine() with a rule of the predictions, or wrap the model by "
            "DistributedDataParallel for rules that look at gradients."
        )


def of_all(
    make: Callable[[Any], PoseJacobian],
    trainable: Callable[[], Mapping[str, Tensor]],
    ranks: Ranks | None,
) -> PoseJacobian | SharedJacobian:
    """The Jacobian of all poses, be they of this process or of several ranks.

    Raises:
        UnsupportedModuleError: if FSDP2 has sharded the parameters.
    """
    check_whole(ranks)
    return make(trainable()) if ranks is None else SharedJacobian(make, trainable, ranks)
