r"""The Jacobian of a group whose poses are spread over ranks.

Each rank holds the rows of its own poses. A product with weights is a sum over ranks; a product
with a direction is computed by each rank for its own rows. The Gramian needs all rows together,
but one layer at a time is enough:

.. math::
    G = \sum_l J_l J_l^\top .

So the rows of one layer, as they are held, go to one rank, those of the next layer to the next
rank, and the resulting products are summed. No rank ever has the whole of J.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from posegrad._restoring import restoring
from posegrad.errors import (
    NoPosesError,
    UnsupportedModuleError,
)
from posegrad.jacobian._block import Block
from posegrad.jacobian._deliver import Gradient, deposit, gradient_of
from posegrad.jacobian._directions import Directions
from posegrad.jacobian._exchange import (
    agreed,
    check_outputs,
    check_same,
    check_same_directions,
    layers,
    made_of,
    packed,
    summed,
)
from posegrad.jacobian._iterate import one_at
from posegrad.jacobian._parts import checked_weights
from posegrad.jacobian._precision import wide
from posegrad.jacobian.base import Jacobian, check_columns
from posegrad.jacobian.local import PoseJacobian
from posegrad.ranks import Ranks
from posegrad.weighting._rules import AnyRule, as_gradient_rule

__all__ = ["SharedJacobian", "check_whole", "of_all"]

Grams = dict[str, Tensor]


@final
class SharedJacobian(Jacobian):
    r"""The Jacobian of a group whose poses several ranks score.

    To all ranks together it is what `PoseJacobian` is to one process: predictions, weights, norms
    and Gramians cover all rows, in the order of the ranks. All ranks, also those without poses,
    call its methods together, in the same order, with the same arguments, and get the same results.

    Attributes:
        predictions: Those of all ranks, of `output_shape`, detached.

    Args:
        own: The rows of this rank.
        predictions: The predictions of all ranks.
        parameters: By name.
        used: The parameters that the predictions of any rank depend on.
        places: For each rank, the entries of dimension 0 of the predictions that its rows belong
            to.
        ranks: The ranks that share the group.

    Note:
        Memory: each rank holds its own rows. Each method says what is sent.

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
        own: PoseJacobian,
        predictions: Tensor,
        parameters: Mapping[str, Tensor],
        used: Sequence[str],
        places: Sequence[Tensor],
        ranks: Ranks,
    ) -> None:
        self.predictions = predictions
        self._own = own
        self._parameters = dict(parameters)
        self._used = list(used)
        self._places = list(places)
        self._ranks = ranks

    @classmethod
    def read(
        cls,
        make: Callable[[Any], PoseJacobian],
        trainable: Callable[[], Mapping[str, Tensor]],
        ranks: Ranks,
    ) -> "SharedJacobian":
        """Reads the Jacobian that the ranks share.

        Args:
            make: Makes this rank's rows by parameters; raises NoPosesError if it has no poses.
            trainable: Looks up the parameters by name.
            ranks: The ranks that share the group.

        Raises:
            NoPosesError: if no rank has poses.
            ShapeMismatchError: if ranks disagree in the shape of a row.
            RankError: if another rank failed.
        """
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
        ranks = agreed(ranks, numbers, layouts)
        present = [one for one in everyone if one is not None]
        check_outputs([predictions for predictions, _ in present])
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        predictions = torch.cat([predictions for predictions, _ in present]).to(device)
        used = {name for _, names in present for name in names}
        counts = [0 if one is None else len(one[0]) for one in everyone]
        places = torch.split(torch.arange(len(predictions)), counts)
        own = made[0] if made else PoseJacobian.empty(predictions, parameters)
        return cls(
            own, predictions, parameters, [n for n in parameters if n in used], places, ranks
        )

    @property
    def own(self) -> PoseJacobian:
        """The rows of this rank."""
        return self._own

    @property
    def used(self) -> list[str]:
        return self._used

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self._own.shapes

    @property
    def mixed(self) -> list[str]:
        return self._own.mixed

    def of(self, names: Sequence[str]) -> "SharedJacobian":
        used = [name for name in self._used if name in names]
        parameters = {name: self._parameters[name] for name in names}
        own, places = self._own.of(names), self._places
        return SharedJacobian(own, self.predictions, parameters, used, places, self._ranks)

    def release(self, names: Sequence[str]) -> None:
        self._own.release(names)

    def consumed(self) -> "SharedJacobian":
        self._own.consumed()
        return self

    def __repr__(self) -> str:
        own, shape = len(self._own), list(self.output_shape)
        return f"SharedJacobian(output_shape={shape}, own_rows={own}, ranks={self._ranks.count})"

    @restoring
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        whole = "the output of all ranks"
        return self._combined(lambda: checked_weights(weights, self.output_shape, whole))

    def _gradient(self, index: Any) -> dict[str, Tensor]:
        return self._combined(lambda: one_at(index, self.predictions))

    def _combined(self, weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        first = self._ranks.together("combine rows", lambda: weights().cpu())[0]
        own: dict[str, Tensor] = {}

        def work() -> list[bool]:
            of_own = first[self._places[self._ranks.own]]
            own.update(self._own.combine(of_own.to(self.predictions.device)))
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
        found = self._made_by(rule, partial(gradient_of, scaler=scaler))
        deposit(found.own, self._parameters)
        deposit(found.of_rule, found.trained)
        return found.weights

    @restoring
    def made_by(self, rule: Tensor | AnyRule, *, or_nan: bool = False) -> Gradient:
        return self._made_by(rule, partial(gradient_of, or_nan=or_nan))

    def _made_by(self, rule: Tensor | AnyRule, make: Callable[..., Gradient]) -> Gradient:
        """The gradient that every rank makes of the rows, once all agree on it."""
        found: list[Gradient] = []

        def applied() -> tuple[str, float, float, Tensor | None, Grams]:
            made = make(as_gradient_rule(rule), self)
            found.append(made)
            told = None if made.weights is None else made.weights.cpu()
            of_rule = {n: g.cpu() for n, g in made.of_rule.items()}
            return made_of(rule), *summed(made.own.values()), told, of_rule

        told = self._ranks.together("apply the rule", applied)
        check_same(*zip(*(one[:3] for one in told), strict=True))
        own, weights, _, trained = found.pop()
        means = {n: torch.stack([each[n] for *_, each in told]).mean(dim=0) for n in told[0][4]}
        first = told[0][3]
        weights = None if weights is None or first is None else first.to(weights.device)
        return Gradient(own, weights, means, trained)

    @restoring
    def block(self, name: str) -> Tensor:
        return self._rows(f"rows of {name}", lambda: self._own.block(name))

    @restoring
    def matrix(self) -> Tensor:
        shape = len(self._own), self.output_shape[1:].numel(), self.shape[1]
        grids = self._rows("matrix", lambda: self._own.matrix().reshape(shape))
        return grids.flatten(0, 1)

    def to(self, device: torch.device | str) -> "SharedJacobian":
        own, predictions = self._own.to(device), self.predictions.to(device)
        return self._like(own, predictions, self._used, self._places)

    def report(self) -> str:
        return self._own.report()

    @property
    def _dtypes(self) -> list[torch.dtype]:
        return [parameter.dtype for parameter in self._parameters.values()]

    def _like(
        self,
        own: PoseJacobian,
        predictions: Tensor,
        used: Sequence[str],
        places: Sequence[Tensor],
    ) -> "SharedJacobian":
        """A Jacobian of other rows on the same ranks."""
        return SharedJacobian(own, predictions, self._parameters, used, places, self._ranks)

    def _rows(self, step: str, of_own: Callable[[], Tensor]) -> Tensor:
        """Collects each rank's `[own, ...]` of its own rows, in the order of all: `[len, ...]`."""
        everyone = self._ranks.together(step, lambda: of_own().cpu())
        pairs = zip(everyone, self._places, strict=True)
        found = [(rows, places) for rows, places in pairs if len(places)]
        if not found:
            return everyone[0].to(self.predictions.device)
        joined = torch.cat([rows for rows, _ in found])
        order = torch.cat([places for _, places in found])
        whole = torch.empty_like(joined).index_copy_(0, order, joined)
        return whole.to(self.predictions.device)

    def _in_order(self, rows: Tensor, dim: int) -> Tensor:
        """Puts rows of all ranks, concatenated along `dim`, into the output's order."""
        inner = self.output_shape[1:].numel()
        places = torch.cat(self._places).to(rows.device)
        order = places.unsqueeze(1) * inner + torch.arange(inner, device=rows.device)
        return torch.empty_like(rows).index_copy_(dim, order.reshape(-1), rows)

    def _both_in_order(self, products: Tensor) -> Tensor:
        """Puts products of all ranks' rows with each other into the output's order, both ways."""
        return self._in_order(self._in_order(products, 0), 1)

    @restoring
    def _moved(self, directions: object) -> Tensor:
        found: list[Tensor] = []

        def work() -> tuple[float, float]:
            found.append(self._own._moved(directions))
            return summed(Directions.of(directions, self.shapes).by_name.values())

        told = self._ranks.together("move the parameters", work)
        check_same_directions(*zip(*told, strict=True))
        return self._rows("put what moved together", lambda: found[0])

    @restoring
    def _met(self, other: Jacobian) -> Tensor:
        check_columns(self, other, "The other Jacobian")
        assert isinstance(other, SharedJacobian)
        both = self, other
        names = [name for name in self.shapes if all(name in one.used for one in both)]

        def sent(layer: Sequence[str]) -> bytes:
            return packed(tuple([one._to_send(layer) for one in both]))

        def of_layer(layer: Sequence[str], found: Sequence[bytes]) -> Grams:
            parts = zip(*(pickle.loads(rows) for rows in found), strict=True)
            left, right = (one._whole(layer, own) for one, own in zip(both, parts, strict=True))
            return {name: left.of([name])._met(right.of([name])) for name in layer}

        grams = self._by_layers(names, sent, of_layer)
        total = self._added(grams, len(other.predictions.reshape(-1)), None)
        return other._in_order(self._in_order(total, 0), 1)

    @restoring
    def _gram(self, dtype: torch.dtype | None) -> Tensor:
        grams = self._grams_here(self._used, dtype)
        total = self._added(grams, self.predictions.numel(), dtype)
        return self._both_in_order(total)

    @restoring
    def _grams(self, dtype: torch.dtype | None) -> Grams:
        grams, count = self._grams_here(list(self.shapes), dtype), self.predictions.numel()
        found = {}
        for name in self.shapes:
            own = {name: grams[name]} if name in grams else {}
            kind = dtype or wide(self._parameters[name].new_empty(0)).dtype
            found[name] = self._both_in_order(self._added(own, count, kind))
        return found

    def _grams_here(
        self, names: Sequence[str], dtype: torch.dtype | None, *, in_double: bool = False
    ) -> Grams:
        """The Gramians of the layers that this rank computes."""

        def sent(layer: Sequence[str]) -> bytes:
            return packed(self._to_send(layer))

        def of_layer(layer: Sequence[str], found: Sequence[bytes]) -> Grams:
            whole = self._whole(layer, [pickle.loads(rows) for rows in found])
            whole = whole.double() if in_double else whole
            return whole.consumed()._grams(dtype)

        return self._by_layers(names, sent, of_layer)

    @restoring
    def _gram_in_double(self) -> Tensor:
        grams = self._grams_here(self._used, torch.float64, in_double=True)
        total = self._added(grams, self.predictions.numel(), torch.float64)
        return self._both_in_order(total)

    @restoring
    def _norms(self) -> Tensor:
        return self._rows("norms", self._own.norms)

    @restoring
    def _norms_of_each(self) -> dict[str, Tensor]:
        def of_own() -> Tensor:
            norms = [norms.double() for norms in self._own._norms_of_each().values()]
            return torch.stack(norms, dim=1)  # [own, parameters, ...]

        found = self._rows("norms of each parameter", of_own).unbind(1)
        kinds = [wide(p.new_empty(0)).dtype for p in self._parameters.values()]
        return {n: v.to(k) for n, v, k in zip(self._parameters, found, kinds, strict=True)}

    @restoring
    def _projected(self, k: int, seed: int) -> Tensor:
        shape = len(self._own), self.output_shape[1:].numel(), k
        rows = self._rows("project rows", lambda: self._own._projected(k, seed).reshape(shape))
        return rows.flatten(0, 1)

    @restoring
    def _picked(self, index: Tensor) -> "SharedJacobian":
        count = len(self.predictions)
        ranks, numbers = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
        for rank, own in enumerate(self._places):
            ranks[own], numbers[own] = rank, torch.arange(len(own))
        of_rank = ranks[index]
        made: list[PoseJacobian] = []

        def work() -> list[str]:
            mine = numbers[index][of_rank == self._ranks.own]
            made.append(self._own._picked(mine))
            return made[0].used

        used = {name for names in self._ranks.together("pick rows", work) for name in names}
        places = [(of_rank == rank).nonzero().squeeze(1) for rank in range(self._ranks.count)]
        predictions = self.predictions[index.to(self.predictions.device)]
        return self._like(made[0], predictions, [n for n in self._used if n in used], places)

    def _followed(self, others: Sequence[Jacobian]) -> "SharedJacobian":
        every = [self, *(other for other in others if isinstance(other, SharedJacobian))]
        own = PoseJacobian.joined([one._own for one in every])
        predictions = torch.cat([one.predictions for one in every])
        used = [name for name in self.shapes if any(name in one._used for one in every)]
        starts = [0, *accumulate(len(one) for one in every)]
        by_rank = zip(*(one._places for one in every), strict=True)
        joined = [
            torch.cat([start + own for start, own in zip(starts, each, strict=False)])
            for each in by_rank
        ]
        return self._like(own, predictions, used, joined)

    def _to_send(self, names: Sequence[str]) -> dict[str, Block]:
        return {name: self._own.blocks[name].to("cpu") for name in names}

    def _whole(self, names: Sequence[str], parts: Sequence[Mapping[str, Block]]) -> PoseJacobian:
        """The rows of some parameters on all ranks, concatenated."""
        device = self.predictions.device
        blocks = {n: Block.joined([part[n] for part in parts]).to(device) for n in names}
        return PoseJacobian(self.predictions, {n: self._parameters[n] for n in names}, blocks)

    def _by_layers(
        self,
        names: Sequence[str],
        sent: Callable[[Sequence[str]], bytes],
        of_layer: Callable[[Sequence[str], Sequence[bytes]], Grams],
    ) -> Grams:
        """Products of the layers that this rank computes; other ranks compute the rest.

        Args:
            names: The parameters.
            sent: What this rank sends of a layer.
            of_layer: From a layer's names and what all ranks sent of it to its products.
        """
        grams: Grams = {}
        failure: Exception | None = None
        for number, layer in enumerate(layers(names)):
            to = number % self._ranks.count
            try:
                own = sent(layer)
            except Exception as error:  # raised for all below: the others wait for this rank's rows
                own, failure = b"", failure or error
            found = self._ranks.sent(own, to)
            if found and all(found):
                try:
                    grams |= of_layer(layer, found)
                except Exception as error:
                    failure = failure or error

        def finished() -> None:
            if failure is not None:
                raise failure

        self._ranks.together("multiply rows with rows", finished)
        return grams

    def _added(self, grams: Grams, columns: int, dtype: torch.dtype | None) -> Tensor:
        """The sum of the layers' products, wherever they were computed: `[M, columns]`."""
        shape, device = (self.predictions.numel(), columns), self.predictions.device
        total = torch.zeros(shape, dtype=dtype or self._kind, device=device)
        for gram in grams.values():
            total += gram
        return self._ranks.added(total)


@restoring
def check_whole(ranks: Ranks | None) -> None:
    """Refuses parameters that are sharded over ranks.

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
) -> Jacobian:
    """The Jacobian of all poses, whether of this process or of several ranks.

    Raises:
        UnsupportedModuleError: if FSDP2 has sharded the parameters.
    """
    check_whole(ranks)
    return make(trainable()) if ranks is None else SharedJacobian.read(make, trainable, ranks)
