"""Checks that a model keeps the poses of a batch apart, so that it may be divided anywhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from posegrad.errors import PosesMixError, UnsupportedModuleError
from posegrad.graph import keep_apart, mixing_modules
from posegrad.schedule._chunks import Portion
from posegrad.schedule._inputs import Inputs
from posegrad.schedule._memory import Known
from posegrad.schedule._poses import map_tensors, shapes_of
from posegrad.schedule._replay import Moment, Surroundings

__all__ = ["Apart"]

Score = Callable[[Portion, int], Tensor]


@final
class Apart:
    """Finds out, once for each kind of pose, whether poses scored together influence each other.

    Two poses, a and b, are scored as the batches (a, b), (a, a) and (b, b), with the same random
    state and buffers. If a has the same prediction and gradient in (a, b) and (a, a), and b in
    (a, b) and (b, b), neither depends on the other. That also finds poses that mix by data without
    gradient, and works under dropout, whose masks are the same each time.

    If the model draws no random number, both are also scored among other poses of their chunk. That
    finds models that depend on the number of poses, or on a pose's place among them.

    Args:
        modules: The models.
        named: Looks up their parameters.
        parts: Lists all modules inside.
        tensors: Lists their parameters and buffers.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        named: Callable[[], Mapping[str, nn.Parameter]],
        parts: Callable[[], Sequence[nn.Module]],
        tensors: Callable[[], Iterator[Tensor]],
    ) -> None:
        self._modules = modules
        self._named = named
        self._parts = parts
        self._tensors = tensors

    def shown(self, portions: Iterator[Portion], known: Known, score: Score) -> Iterator[Portion]:
        """The chunks, checked once the first of several poses has been scored.

        By then the model is known to work.

        Raises:
            PosesMixError: if poses mix.
        """
        for portion in portions:
            yield portion
            if portion.count < 2 or portion.how == "alone":
                continue
            if _kind(portion) not in known.apart:
                self._look_at(portion, known, score)

    def proves(self, portion: Portion, known: Known, score: Score) -> bool:
        """Whether poses that the caller has scored together may be scored again by themselves.

        That they were seen to stay apart is not enough: the operators must show it.
        """
        ragged = portion.is_ragged()
        if ragged not in known.picks:
            try:
                known.picks[ragged] = self._is_proved(portion, score, known.most)
            except Exception:  # the model may not take two of them
                known.picks[ragged] = False
        return known.picks[ragged]

    def _look_at(self, portion: Portion, known: Known, score: Score) -> None:
        pair = _Pair(self._modules, portion, score, known.most)
        try:
            where = self._where_mixed(pair)
        except Exception as error:
            error.add_note(_NOTE)
            raise
        if where is not None:
            raise PosesMixError(_message(where))
        if pair.is_telling:
            known.apart.add(_kind(portion))

    def _is_proved(self, portion: Portion, score: Score, most: int | None) -> bool:
        pair = _Pair(self._modules, portion, score, most)
        inputs = self._inputs()
        inputs.close()  # a backward is under way
        with pair.surroundings.restored(), torch.enable_grad():
            if not (pair.is_telling and pair.looked_at(inputs).apart):
                return False
            return keep_apart(pair.scored(*pair.ends), self._trained(), self._tensors())

    def _where_mixed(self, pair: "_Pair") -> str | None:
        """The modules at which poses mix, as far as can be told; None if the poses stay apart."""
        with pair.surroundings.restored():
            seen = pair.looked_at(self._inputs())
            if seen.apart:
                return None
            where = self._named_in(pair.scored(*pair.ends))
            # A model with a random generator of its own never gives the same result twice.
            return where if where or seen.is_steady else None

    def _inputs(self) -> Inputs:
        return Inputs(self._named(), None, self._parts())

    def _named_in(self, predictions: Tensor) -> str:
        """Where poses mix, as far as the graph shows."""
        try:
            return mixing_modules(predictions, self._trained(), self._tensors())
        except _NO_GRADIENTS:
            return ""

    def _trained(self) -> dict[str, nn.Parameter]:
        trained = {name: p for name, p in self._named().items() if p.requires_grad}
        return {name: p for name, p in trained.items() if not p.is_complex()}


@final
class _Seen(NamedTuple):
    """What was seen of a pair of poses: whether they stay apart, and whether results repeat."""

    apart: bool
    is_steady: bool


@final
class _Pair:
    """The first of some poses and one unlike it, scored beside each other.

    Args:
        modules: The models.
        portion: The poses.
        score: Runs the model.
        most: How many may be scored together, if a larger number ran out of memory.

    Attributes:
        ends: Their numbers.
        is_telling: Whether their predictions differ; otherwise mixing can hardly be seen.
    """

    def __init__(
        self, modules: Sequence[nn.Module], portion: Portion, score: Score, most: int | None
    ) -> None:
        self._modules = modules
        self.surroundings = Surroundings(modules)
        buffers = self.surroundings.buffers.values
        self._moment = Moment(self.surroundings.random_state(), buffers)
        self._portion = portion
        self._score = score
        self._most = min(portion.count, most or _MANY, _MANY)
        other = _other(portion)
        self.is_telling = other is not None
        self.ends = 0, other or portion.count - 1

    def scored(self, *numbers: int) -> Tensor:
        """The predictions of two poses, each of which may be there twice."""
        picked = self._portion.picked(numbers)
        cut = picked.holding([map_tensors(_cut, pose) for pose in picked.poses])
        with self.surroundings.at(self._moment):
            return self._score(cut, 0)

    def looked_at(self, inputs: Inputs) -> _Seen:
        """Whether each gives the same result, whatever is beside it."""

        def look(row: int, *numbers: int) -> _Look:
            return _Look.at(self.scored(*numbers), [row], inputs)

        a, b = self.ends
        first = look(0, a, b)
        draws = self._draws()
        self.surroundings.buffers.note_changes()  # so that the next forwards find the same buffers
        last = look(1, a, b)
        steady = _alike(first.predictions, last.predictions)
        apart = first.is_like(look(0, a, a)) and last.is_like(look(1, b, b))
        if apart and steady and not draws:
            apart = self._is_same_among_more(first, last, inputs)
        return _Seen(apart, steady)

    def _draws(self) -> bool:
        """Whether the forward that just ran drew random numbers."""
        return not all(map(torch.equal, self.surroundings.random_state(), self._moment.random))

    def _is_same_among_more(self, first: "_Look", last: "_Look", inputs: Inputs) -> bool:
        """Whether both give the same results among more poses of their chunk, at other places."""
        a, b = self.ends
        rest = [i for i in range(self._portion.count) if i not in self.ends]
        rest = rest[:: -(-len(rest) // max(1, self._most - 2))] if rest else []
        numbers = [a, *rest, b] if rest else [b, a, b]
        rows = [numbers.index(a), len(numbers) - 1]
        among = _Look.at(self.scored(*numbers), rows, inputs)
        if not bool(among.predictions.isfinite().all()):
            self.is_telling = False  # a later error names the pose
            return True
        # Predictions may be mere rounding, e.g. a sum over the output of a layer norm.
        largest = max((_size(p.detach()) for p in self._parameters()), default=0.0)
        return among.is_about([first, last], self._rounding(among.predictions), largest)

    def _rounding(self, predictions: Tensor) -> float:
        """A generous bound on rounding between kernels for different numbers of rows."""
        devices = {predictions.device.type, "cpu"}
        kinds = {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
        tensors = (predictions, *self._parameters())
        kinds |= {t.dtype for t in tensors if t.is_floating_point()}
        return float(max(torch.finfo(kind).eps for kind in kinds) ** 0.25)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for module in self._modules for p in module.parameters())


@final
@dataclass(frozen=True)
class _Look:
    """The results of some poses among those scored together.

    Args:
        predictions: Those of all poses scored together.
        rows: The numbers of the poses looked at.
        gradients: Those of the sum of their predictions, by number of parameter; None if they
            cannot be had. They show what predictions may hide: behind a gate that is zero, poses
            mix too.
    """

    predictions: Tensor
    rows: Sequence[int]
    gradients: Mapping[int, Tensor] | None

    @classmethod
    def at(cls, predictions: Tensor, rows: Sequence[int], inputs: Inputs) -> "_Look":
        """The results of some rows of predictions `[c, ...]`."""
        gradients: Mapping[int, Tensor] | None = None
        cotangent = torch.zeros_like(predictions)
        cotangent[list(rows)] = 1
        # The graph is kept: part of it may be the user's.
        with suppress(*_NO_GRADIENTS):
            gradients = inputs.gradients(predictions, cotangent, {}, keep_graph=True)
        return cls(predictions.detach(), rows, gradients)

    @property
    def seen(self) -> Tensor:
        """The predictions of the poses looked at."""
        return self.predictions[list(self.rows)]

    def is_like(self, other: "_Look") -> bool:
        """Whether the same poses beside others gave the same results, up to rounding."""
        if not _alike(self.seen, other.seen):
            return False
        if self.gradients is None or other.gradients is None:
            return True
        # Beside the gradients of other parameters, a gradient that is mere rounding says nothing.
        least = max((_size(g) * 2**10 * _eps(g) for g in self.gradients.values()), default=0.0)
        pairs = _beside(self.gradients, other.gradients)
        return all(_alike(*pair, least) for pair in pairs)

    def is_about(self, parts: "Sequence[_Look]", rounding: float, largest: float) -> bool:
        """Whether these poses gave roughly what each gave among few.

        Kernels depend on the number of rows, so the comparison is rough: relative to the largest
        prediction or, where all predictions are far smaller, to the largest parameter.
        """
        bound = max(rounding * _size(self.predictions), rounding**2 * largest)
        expected = torch.cat([part.seen for part in parts])
        if not torch.allclose(self.seen, expected, rtol=0, atol=bound, equal_nan=True):
            return False
        if self.gradients is None or any(part.gradients is None for part in parts):
            return True
        steepest = max(map(_size, self.gradients.values()), default=0.0)
        each = [self.gradients, *(part.gradients or {} for part in parts)]
        return all(
            _adds_up(
                [g[i].to_dense() for g in each if i in g], i in self.gradients, rounding, steepest
            )
            for i in set().union(*each)
        )


def _adds_up(gradients: Sequence[Tensor], has_sum: bool, rounding: float, largest: float) -> bool:
    """Whether the first of some gradients, or zero, is about the sum of the others."""
    zero = torch.zeros_like(gradients[0])
    total, *parts = gradients if has_sum else [zero, *gradients]
    bound = max(rounding * max(map(_size, gradients)), rounding**2 * largest)
    if not bool(total.isfinite().all()):
        return True  # zero times nan, from a pose that is not compared
    return torch.allclose(total, sum(parts, zero), rtol=0, atol=bound, equal_nan=True)


def _beside(
    mine: Mapping[int, Tensor], theirs: Mapping[int, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients in pairs; zeros for an expert that only the neighbour went through."""
    for i in mine.keys() | theirs.keys():
        zeros = torch.zeros_like(mine[i] if i in mine else theirs[i])
        yield mine.get(i, zeros), theirs.get(i, zeros)


def _alike(found: Tensor, expected: Tensor, least: float = 0.0) -> bool:
    """Whether they are equal up to rounding: kernels may depend on how many rows there are."""
    found, expected = found.to_dense(), expected.to_dense()
    bound = max(_size(found) * _eps(found) ** 0.5, least)
    return torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)


def _size(tensor: Tensor) -> float:
    return float(tensor.to_dense().abs().nan_to_num(posinf=0).max()) if tensor.numel() else 0.0


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype.to_real()).eps


def _cut(tensor: Tensor) -> Tensor:
    """A tensor without its graph, which is the user's."""
    return tensor.detach().requires_grad_().clone() if tensor.requires_grad else tensor


def _kind(portion: Portion) -> tuple[bool, bool]:
    """Which chunks one check covers: with graphs or without, padded or not."""
    return torch.is_grad_enabled(), portion.is_ragged()


def _other(portion: Portion) -> int | None:
    """A pose unlike the first, in shape if possible; None if there is none."""
    last, first = portion.count - 1, portion.picked([0])
    if portion.is_ragged():
        shapes = shapes_of(first.poses[0])
        return next((i for i in range(last, 0, -1) if shapes_of(portion.poses[i]) != shapes), None)
    tried = range(last, max(0, last - _MANY), -1)
    return next((i for i in tried if _differ(first.tensors(), portion.picked([i]).tensors())), None)


def _differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    plain = (
        [p for t in side for p in (t.unbind() if t.is_nested else [t])] for side in (first, second)
    )
    return not all(map(torch.equal, *plain))


_MANY = 64  # poses compared together, or one after another, at most

_NO_GRADIENTS = (RuntimeError, UnsupportedModuleError)
"""What backward raises where a graph can be used only once, or only by a plain backward."""

_NOTE = (
    "This was raised while two poses were scored, to see whether the model keeps poses apart. "
    "Engine(..., chunk_size=...) leaves that out."
)


def _message(where: str) -> str:
    through = f", through the activations of: {where}" if where else ""
    return (
        f"The prediction of a pose depends on the poses that are scored together with "
        f"it{through}.\n"
        f"A batch is divided into slices as memory allows, and each way to divide it would give "
        f"another result. The cause may be batch statistics, a mean over dimension 0, its "
        f"length, a place in it, padding without a mask, or a layer that takes dimension 0 for a "
        f"sequence.\n"
        f"Let dimension 0 count poses (batch_first=True), call model.eval() where statistics are "
        f"to be fixed, pass list(poses) to score them one by one, or set "
        f"Engine(..., chunk_size=...), which says how many poses are scored together."
    )
