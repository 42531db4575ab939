"""Schedule `recompute`: score all poses without graphs, then again those that carry weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from posegrad._torch import version_of
from posegrad.combination import Combination
from posegrad.combination._base import flush_denormals
from posegrad.combination._groups import groups_of
from posegrad.errors import ReplayError, listed
from posegrad.schedule._attach import Gradients
from posegrad.schedule._chunks import Portion
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._poses import Pose, shapes_of, tensors_of
from posegrad.schedule._replay import Moment, without_graph
from posegrad.schedule._result import Combined, combined
from posegrad.schedule._run import Run
from posegrad.schedule._work import name_of

__all__ = ["recompute"]


def recompute(run: Run, rule: Combination) -> Combined:
    r"""Scores all m poses, lets autograd find their weights, and replays k of them.

    Memory: the predictions and, in backward, one graph and one sum of parameter size. Time: m
    forwards, then k forwards and k backwards, where k poses have a cotangent that is not exactly
    zero. Serves any rule, any loss of both outputs and any number of groups.

    Single poses are replayed where those of a chunk stay apart and no random number was drawn;
    otherwise, whole chunks.

    With `skip_below` = s > 0, poses whose weight is below s times the largest of their group are
    left out too. If
    :math:`|w_i| < s \max_j |w_j|` for the poses i left out, the gradient is off by at most
    :math:`s \max_j |w_j| \sum_i \lVert g_i \rVert`.
    """
    tape = _Tape(run, rule)
    predictions = tape.scored()

    def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
        (cotangent,) = cotangents
        if cotangent is None:
            return [None] * len(run.inputs.tensors)
        return tape.pull(cotangent)

    return combined(run, rule, predictions, pullback)


@final
@dataclass(frozen=True)
class _Scored:
    """A chunk of the first pass: what a replay needs.

    Args:
        numbers: The numbers of its poses.
        portion: The poses.
        versions: The versions of the tensors in each part.
        moment: What the forward found.
    """

    numbers: range
    portion: Portion
    versions: list[list[int]]
    moment: Moment

    def kept_in(self, kept: Sequence[bool]) -> list[int]:
        """The places, in the chunk, of the poses that are kept."""
        return [i for i, number in enumerate(self.numbers) if kept[number]]

    def changed(self, kept: Sequence[bool]) -> list[int]:
        """The kept poses whose tensors were written since."""
        now = [_versions(part) for part in self.portion.poses]
        if now == self.versions:
            return []
        changed = [a != b for a, b in zip(now, self.versions, strict=True)]
        if self.portion.how == "slice":  # one for all its poses
            changed *= len(self.numbers)
        return [i for i, own in zip(self.numbers, changed, strict=True) if own and kept[i]]


@final
@dataclass(frozen=True)
class _Picks:
    """The poses of a chunk that carry weight.

    Args:
        chunk: The chunk.
        places: Their places in it.
    """

    chunk: _Scored
    places: Sequence[int]

    @property
    def are_some(self) -> bool:
        """Whether they are some of its poses, but not all."""
        return 0 < len(self.places) < len(self.chunk.numbers)

    @property
    def numbers(self) -> list[int]:
        """Their numbers among all poses."""
        return [self.chunk.numbers[place] for place in self.places]

    @cached_property
    def portion(self) -> Portion:
        """The poses by themselves."""
        return self.chunk.portion.picked(self.places)

    @cached_property
    def extent(self) -> float:
        """The bytes that the model gets for one of them."""
        return self.portion.extent() / len(self.places)

    def is_like(self, other: "_Picks") -> bool:
        """Whether both chunks are padded, or neither, even when joined."""
        ragged = self.chunk.portion.is_ragged()
        if ragged or self.chunk.portion.how != "joined":
            return ragged == other.chunk.portion.is_ragged()
        return shapes_of(self.portion.poses[0]) == shapes_of(other.portion.poses[0])


@final
class _Tape:
    """What the first pass leaves on this rank: poses, predictions, moments, no graph."""

    predictions: Tensor
    """The predictions of all ranks, `[m, ...]`."""

    def __init__(self, run: Run, rule: Combination) -> None:
        self._run = run
        self._rule = name_of(rule)
        self._groups = groups_of(rule)
        self._skip_below = run.call.request.skip_below
        self._chunks: list[_Scored] = []

    def scored(self) -> Tensor:
        """The first pass: the predictions `[m, ...]` of all ranks."""
        self.predictions = self._run.group(self._recorded)
        return self.predictions

    def _recorded(self) -> list[Tensor]:
        """The predictions of all chunks on this rank."""
        values: list[Tensor] = []
        idle = self._run.lag()
        for chunk in self._run.chunks(with_graph=False):
            versions = [_versions(part) for part in chunk.portion.poses]
            self._chunks.append(_Scored(chunk.numbers, chunk.portion, versions, chunk.moment))
            values.append(chunk.predictions.detach())
            del chunk  # its graph must be gone before the next one grows
        with self._run.surroundings.restored(), without_graph():
            for _ in range(idle):
                self._score_again(self._chunks[0])
        buffers = self._run.surroundings.buffers
        buffers.check_none_missed()
        self._picks = not (self._run.draws or buffers.has_changed)
        if self._run.known is not None:
            self._run.known.note_draws(not self._picks)
        return values

    def pull(self, cotangent: Tensor) -> Gradients:
        """The vector-Jacobian product with a cotangent `[m, ...]`, by replaying own poses."""
        own = self._run.own
        cotangent = self._without_light_poses(flush_denormals(cotangent))[own.start : own.stop]
        kept = (_sizes(cotangent) != 0).tolist()
        self._check_unchanged(kept)
        self._note(sum(kept[: len(cotangent)]))
        total = GradientSum()
        chunks = [
            chunk for chunk in self._chunks if any(kept[chunk.numbers.start : chunk.numbers.stop])
        ]
        idle = self._run.lag(len(chunks))
        with self._run.surroundings.restored(), torch.enable_grad():
            for gradients in self._replayed(chunks, cotangent, kept):
                total.add(gradients)
                del gradients  # before the next chunk is scored
            for _ in range(idle):
                self._whole(self._chunks[0], torch.zeros_like(cotangent))
        if chunks:
            self._run.check_differentiable()
        return total.delivered(self._run.inputs.tensors)

    def _without_light_poses(self, cotangent: Tensor) -> Tensor:
        """The cotangent, with zeros for poses that are left out."""
        if self._skip_below == 0:
            return cotangent
        size = _sizes(cotangent)
        light = size < self._skip_below * self._largest(size)  # [m]
        return cotangent.masked_fill(light.reshape(-1, *[1] * (cotangent.ndim - 1)), 0)

    def _largest(self, size: Tensor) -> Tensor:
        """For each pose of all ranks, the largest size in its group."""
        if self._groups is None:
            return size.max().expand(len(size))
        owners = self._groups.owners.to(size.device)
        return size.new_zeros(self._groups.count).scatter_reduce_(0, owners, size, "amax")[owners]

    def _note(self, counting: int) -> None:
        if self._run.known is not None and self._run.ranks is None:
            self._run.known.counting[self._rule] = counting, len(self.predictions)

    def _replayed(
        self, chunks: Sequence[_Scored], cotangent: Tensor, kept: Sequence[bool]
    ) -> Iterator[dict[int, Tensor]]:
        """The gradients of chunks scored again, several together where that is safe."""
        waiting: list[_Picks] = []
        for chunk in chunks:
            picks = _Picks(chunk, chunk.kept_in(kept))
            if self._may_join(picks):
                waiting.append(picks)
            else:
                yield self._replay(picks, cotangent)
        for together in self._fitting(waiting):
            yield from self._joined(together, cotangent)

    def _joined(
        self, together: "Sequence[_Picks]", cotangent: Tensor
    ) -> Iterator[dict[int, Tensor]]:
        """The gradients of poses of several chunks; chunk by chunk if the joint result differs."""
        gradients = self._picked(together, cotangent) if len(together) > 1 else None
        if gradients is not None:
            yield gradients
            return
        for picks in together:
            yield self._replay(picks, cotangent)

    def _may_join(self, picks: "_Picks") -> bool:
        """Whether poses of a chunk may be scored again with those of others."""
        known = self._run.known
        if known is None or not picks.are_some or not self._may_pick(picks.chunk):
            return False
        portion = picks.chunk.portion
        return portion.how == "alone" or portion.is_ragged() in known.compared

    def _fitting(self, waiting: "Sequence[_Picks]") -> "Iterator[list[_Picks]]":
        """The picks in new chunks, no larger than the largest of the first pass."""
        if len(waiting) < 2:
            yield from ([picks] for picks in waiting)
            return
        most = max(len(chunk.numbers) for chunk in self._chunks)
        largest = max(chunk.portion.extent() for chunk in self._chunks)
        together: list[_Picks] = []
        for picks in waiting:
            more = [*together, picks]
            count = sum(len(own.places) for own in more)
            extent = count * max(own.extent for own in more)
            if together and not (
                count <= most and extent <= largest and picks.is_like(together[0])
            ):
                yield together
                more = [picks]
            together = more
        yield together

    def _replay(self, picks: "_Picks", cotangent: Tensor) -> dict[int, Tensor]:
        """The gradients of one chunk, scored again.

        Its poses may depend on each other (batch statistics, one random mask for all), so all are
        scored again, unless `_may_pick` allows less. The first time that some are scored again by
        themselves, all are too, and the gradients are compared.
        """
        chunk = picks.chunk
        if not (picks.are_some and self._may_pick(chunk)):
            return self._whole(chunk, cotangent)
        known = self._run.known
        gradients = self._picked([picks], cotangent)
        ragged = chunk.portion.is_ragged()
        is_sure = chunk.portion.how == "alone" or known is None or ragged in known.compared
        if gradients is not None and is_sure:
            return gradients
        whole = self._whole(chunk, cotangent)
        self._picks = gradients is not None and _agree(gradients, whole)
        if known is not None and self._picks:
            known.compared.add(ragged)
        return whole

    def _whole(self, chunk: _Scored, cotangent: Tensor) -> dict[int, Tensor]:
        """The gradients of a chunk that is scored again as a whole."""
        found, leaves = self._score_again(chunk)
        self._check_same(chunk, found.detach())
        weights = cotangent[chunk.numbers.start : chunk.numbers.stop].clone()
        return self._run.inputs.gradients(found, weights, leaves)

    def _may_pick(self, chunk: _Scored) -> bool:
        """Whether some poses of a chunk may be scored without the others."""
        portion = chunk.portion
        if not self._picks or self._run.inputs.is_sharded():
            return False
        if portion.how == "alone":
            return True
        if portion.how == "slice" and any(t.requires_grad for t in portion.tensors()):
            return False  # its rows are none of the tensors that gradients are delivered to
        return self._run.are_apart(portion)

    def _picked(self, picks: "Sequence[_Picks]", cotangent: Tensor) -> dict[int, Tensor] | None:
        """The gradients of some poses of chunks; None if they score differently by themselves.

        No chunk drew a random number or wrote to a buffer, so any moment will do.
        """
        numbers = [number for own in picks for number in own.numbers]
        with self._run.surroundings.at(picks[0].chunk.moment):
            part = Portion.joined([own.portion for own in picks])
            found, leaves = self._run.score_again(part, numbers[0])
        own = torch.tensor(numbers, device=self.predictions.device)
        expected = self.predictions[self._run.own.start + own]
        if not _is_alike(found.detach(), expected):
            return None
        weights = cotangent[own.to(cotangent.device)]
        return self._run.inputs.gradients(found, weights, leaves)

    def _check_same(self, scored: _Scored, found: Tensor) -> None:
        """Refuses a replay that differs from the first forward.

        On a CPU, the same forward gives the same bits. If they differ only by rounding, a kernel
        may depend on whether there is a graph; then a forward without one gives the same bits.

        Raises:
            ReplayError: if it differs.
        """
        start = self._run.own.start + scored.numbers.start
        chunk = slice(start, start + len(scored.numbers))
        expected = self.predictions[chunk]
        alike = (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if alike and torch.equal(found, expected):
            return
        if alike and _rounded(found, expected, self._largest(_sizes(self.predictions))[chunk]):
            if not self._is_reproducible():
                return
            with without_graph():
                again, _ = self._score_again(scored)
            if torch.equal(again, expected):
                return
        raise ReplayError(_replay_message(scored.numbers, expected, found))

    def _is_reproducible(self) -> bool:
        """Whether the same forward gives the same bits, and may be run again to check.

        In a sharded model all ranks would have to join, which this rank cannot ask for. A forward
        that writes parameters finds others the next time: `max_norm` shortens rows anew, by a last
        bit.
        """
        tensors = (tensor for chunk in self._chunks for tensor in chunk.portion.tensors())
        elsewhere = any(tensor.device.type not in ("cpu", "meta") for tensor in tensors)
        on_cpu = self.predictions.device.type == "cpu" and self._run.surroundings.on_cpu
        inputs = self._run.inputs
        return on_cpu and not (elsewhere or inputs.is_sharded() or inputs.freshness.written)

    def _score_again(self, chunk: _Scored) -> tuple[Tensor, dict[int, Tensor]]:
        with self._run.surroundings.at(chunk.moment):
            return self._run.score_again(chunk.portion, chunk.numbers.start)

    def _check_unchanged(self, kept: Sequence[bool]) -> None:
        changed = [number for chunk in self._chunks for number in chunk.changed(kept)]
        if changed:
            raise ReplayError(
                f"Tensors of pose(s) {listed(changed)} were modified in place "
                f"after they had been scored.\n"
                f"Scored again, they would give other predictions.\n"
                f"Clone the poses before changing them, or, in combine(), use schedule='store'."
            )


def _versions(pose: Pose) -> list[int]:
    return [0 if t.is_inference() else version_of(t) for t in tensors_of(pose)]


def _sizes(values: Tensor) -> Tensor:
    """The largest absolute value in each prediction, `[m]`."""
    return values.abs().flatten(1).amax(dim=1) if values.ndim > 1 else values.abs()


def _agree(found: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> bool:
    """Whether gradients by number of their tensor, zero where absent, are equal up to rounding."""
    whole = math.hypot(*(float(g.norm()) for g in expected.values()))
    for number in {*found, *expected}:
        own, right = found.get(number), expected.get(number)
        present = own if right is None else right
        assert present is not None
        eps = torch.finfo(present.dtype).eps
        apart = (present if own is None or right is None else own - right).norm()
        if not float(apart) <= eps**0.5 * float(present.norm()) + 64 * eps * whole:
            return False
    return True


def _is_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether they are equal up to rounding between kernels for other numbers of rows."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    bound = torch.finfo(expected.dtype).eps ** 0.5 * _sizes(expected)
    return bool((_sizes(found - expected) <= bound).all())


def _rounded(found: Tensor, expected: Tensor, sizes: Tensor) -> bool:
    """Whether they are equal up to the rounding of sums in another order, coarser in 16 bits.

    Relative to the whole group: a prediction near zero may be a small difference of large numbers.
    """
    units = 64 if expected.dtype in (torch.float32, torch.float64) else 4
    bound = units * torch.finfo(expected.dtype).eps * sizes  # [c]
    return bool((_sizes(found - expected) <= bound).all())


def _replay_message(poses: range, expected: Tensor, found: Tensor) -> str:
    return (
        f"Scored again in backward, pose(s) {listed(poses)} gave {found.flatten()[:5].tolist()} "
        f"instead of {expected.flatten()[:5].tolist()}.\n"
        f"The model depends on something that neither its parameters, buffers, training flags, "
        f"autocast nor torch's random state hold: another random generator, a counter, a file; or "
        f"the pose was changed.\n"
        f"Register such state as a buffer, draw from torch's generators, or, in "
        f"combine(), use schedule='stream', 'store' or 'retain', which score each pose once."
    )
