"""Whether a model keeps the poses of a batch apart, so that it may be divided anywhere."""

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
from posegrad.schedule._poses import map_tensors
from posegrad.schedule._replay import Moment, Surroundings

__all__ = ["Apart"]

Score = Callable[[Portion, int], Tensor]


class Apart:
    """Looks once for each kind of pose whether those that are scored together stay apart.

    Two poses, a and b, are scored as the batches (a, b), (a, a) and (b, b), under the same random
    state and on the same buffers. If predictions and their gradients are those of (a, b) in place,
    each was made of one pose. Nothing else is needed of the model: what mixes may be data that no
    gradient flows through, and random masks are alike.

    Args:
        modules: The models.
        named: Looks up their parameters.
        parts: Lists all modules inside.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        named: Callable[[], Mapping[str, nn.Parameter]],
        parts: Callable[[], Sequence[nn.Module]],
    ) -> None:
        self._modules = modules
        self._named = named
        self._parts = parts

    def shown(self, portions: Iterator[Portion], known: Known, score: Score) -> Iterator[Portion]:
        """The chunks; a look is taken once the first of several poses has been scored.

        So it is known to work.

        Raises:
            PosesMixError: if poses mix.
        """
        for portion in portions:
            yield portion
            seen = torch.is_grad_enabled() in known.apart
            if portion.count > 1 and portion.how != "alone" and not seen:
                self._look_at(portion, known, score)

    def proves(self, portion: Portion, known: Known, score: Score) -> bool:
        """Whether poses that the caller has scored together may be scored again by themselves.

        They must not only be seen to stay apart; the operators must tell that they do.
        """
        if known.picks is None:
            try:
                known.picks = self._is_proved(portion, score)
            except Exception:  # the model may not take two of them
                known.picks = False
        return known.picks

    def _look_at(self, portion: Portion, known: Known, score: Score) -> None:
        try:
            where = self._where_mixed(portion, score)
        except Exception as error:
            error.add_note(_NOTE)
            raise
        if where is not None:
            raise PosesMixError(_message(where))
        if _is_telling(portion):
            known.apart.add(torch.is_grad_enabled())

    def _is_proved(self, portion: Portion, score: Score) -> bool:
        pair = _Pair(self._modules, portion, score)
        inputs = self._inputs()
        inputs.close()  # a backward is under way
        with pair.surroundings.restored(), torch.enable_grad():
            if not (pair.looked_at(inputs).apart and _is_telling(portion)):
                return False
            return keep_apart(pair.scored(*pair.ends), self._trained(), self._tensors())

    def _where_mixed(self, portion: Portion, score: Score) -> str | None:
        """The modules at which poses mix, as far as that can be told; None if they stay apart."""
        pair = _Pair(self._modules, portion, score)
        with pair.surroundings.restored():
            seen = pair.looked_at(self._inputs())
            if seen.apart:
                return None
            where = self._named_in(pair.scored(*pair.ends))
            # A model that draws from a generator of its own never gives the same twice.
            return where if where or seen.is_steady else None

    def _inputs(self) -> Inputs:
        return Inputs(self._named(), None, self._parts())

    def _named_in(self, predictions: Tensor) -> str:
        """Where poses mix, as far as the graph tells."""
        try:
            return mixing_modules(predictions, self._trained(), self._tensors())
        except _NO_GRADIENTS:
            return ""

    def _trained(self) -> dict[str, nn.Parameter]:
        trained = {name: p for name, p in self._named().items() if p.requires_grad}
        return {name: p for name, p in trained.items() if not p.is_complex()}

    def _tensors(self) -> Iterator[Tensor]:
        return (t for m in self._modules for t in (*m.parameters(), *m.buffers()))


class _Seen(NamedTuple):
    """What a pair of poses came to: whether they stay apart, and whether the same twice."""

    apart: bool
    is_steady: bool


@final
class _Pair:
    """The first and the last of some poses, which are scored beside each other.

    Args:
        modules: The models.
        portion: The poses.
        score: Runs the model.
    """

    def __init__(self, modules: Sequence[nn.Module], portion: Portion, score: Score) -> None:
        self.surroundings = Surroundings(modules)
        buffers = self.surroundings.buffers.values
        self._moment = Moment(self.surroundings.random_state(), buffers)
        self._portion = portion
        self._score = score
        self.ends = 0, portion.count - 1

    def scored(self, *numbers: int) -> Tensor:
        """The predictions of two poses, each of which may be there twice."""
        picked = self._portion.picked(numbers)
        cut = picked.holding([map_tensors(_cut, pose) for pose in picked.poses])
        with self.surroundings.at(self._moment):
            return self._score(cut, 0)

    def looked_at(self, inputs: Inputs) -> _Seen:
        """Whether each comes to the same, whatever is beside it."""

        def look(row: int, *numbers: int) -> _Look:
            return _Look.at(self.scored(*numbers), row, inputs)

        a, b = self.ends
        first = look(0, a, b)
        self.surroundings.buffers.note_changes()  # so that the others find what this one found
        last = look(1, a, b)
        apart = first.is_like(look(0, a, a)) and last.is_like(look(1, b, b))
        return _Seen(apart, _alike(first.predictions, last.predictions))


@final
@dataclass(frozen=True)
class _Look:
    """What one of two poses came to.

    Args:
        predictions: Of both.
        row: Its number.
        gradients: Of its prediction, by number of parameter; None if they cannot be had. They tell
            what the prediction may hide: behind a gate that is zero, poses mix too.
    """

    predictions: Tensor
    row: int
    gradients: Mapping[int, Tensor] | None

    @classmethod
    def at(cls, predictions: Tensor, row: int, inputs: Inputs) -> "_Look":
        """The look at one row of predictions `[2, ...]`."""
        gradients: Mapping[int, Tensor] | None = None
        cotangent = torch.zeros_like(predictions)
        cotangent[row] = 1
        # Kept, for what the user computed outside may be a part of the graph.
        with suppress(*_NO_GRADIENTS):
            gradients = inputs.gradients(predictions, cotangent, {}, keep_graph=True)
        return cls(predictions.detach(), row, gradients)

    def is_like(self, other: "_Look") -> bool:
        """Whether the same pose beside another came to the same, up to rounding."""
        if not _alike(self.predictions[self.row], other.predictions[self.row]):
            return False
        if self.gradients is None or other.gradients is None:
            return True
        # What is nothing but rounding beside other parameters' gradients says nothing.
        least = max((_size(g) * 2**10 * _eps(g) for g in self.gradients.values()), default=0.0)
        pairs = _beside(self.gradients, other.gradients)
        return all(_alike(*pair, least) for pair in pairs)


def _beside(
    mine: Mapping[int, Tensor], theirs: Mapping[int, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients in pairs; of an expert that only the neighbour went through, zeros."""
    for i in mine.keys() | theirs.keys():
        zeros = torch.zeros_like(mine[i] if i in mine else theirs[i])
        yield mine.get(i, zeros), theirs.get(i, zeros)


def _alike(found: Tensor, expected: Tensor, least: float = 0.0) -> bool:
    """Equal but for rounding: kernels may go by how many rows went the same way."""
    found, expected = found.to_dense(), expected.to_dense()
    bound = max(_size(found) * _eps(found) ** 0.5, least)
    return torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)


def _size(tensor: Tensor) -> float:
    return float(tensor.to_dense().abs().nan_to_num(posinf=0).max()) if tensor.numel() else 0.0


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype.to_real()).eps


def _cut(tensor: Tensor) -> Tensor:
    """A tensor without what computed it, whose graph is the user's."""
    return tensor.detach().requires_grad_().clone() if tensor.requires_grad else tensor


def _is_telling(portion: Portion) -> bool:
    """Whether its first and its last pose differ; else nothing can be seen."""
    return _differ(*(portion.picked([i]).tensors() for i in (0, portion.count - 1)))


def _differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    plain = (
        [p for t in side for p in (t.unbind() if t.is_nested else [t])] for side in (first, second)
    )
    return not all(map(torch.equal, *plain))


_NO_GRADIENTS = (RuntimeError, UnsupportedModuleError)
"""What graphs raise that can be used once only, or by a plain backward only."""

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
        f"another result. Batch statistics do that, a mean over dimension 0, or a layer that takes "
        f"dimension 0 for a sequence.\n"
        f"Let dimension 0 count poses (batch_first=True), call model.eval() where statistics are "
        f"to be fixed, pass list(poses) to score them one by one, or set "
        f"Engine(..., chunk_size=...): poses then are scored together as that says."
    )
