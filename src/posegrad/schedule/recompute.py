"""Schedule `recompute`: score all poses without graphs, then again those that carry weight."""

from collections import deque
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from posegrad.combination import Combination
from posegrad.combination._base import flush_denormals
from posegrad.errors import ReplayError
from posegrad.schedule._attach import Gradients, attach
from posegrad.schedule._gradients import GradientSum
from posegrad.schedule._poses import Pose, in_chunks, tensors_of
from posegrad.schedule._replay import Moment
from posegrad.schedule._session import Combined, Session, group_predictions

__all__ = ["recompute"]


def recompute(session: Session, rule: Combination, *, skip_below: float = 0.0) -> Combined:
    r"""Scores the m poses, lets autograd find each one's weight, and replays k of them.

    Memory: the predictions, and in backward one graph and one sum of parameter size. Time: m
    forwards, then k forwards and k backwards, where k poses have a cotangent that is not exactly
    zero. Serves any rule and any loss of both outputs.

    With `skip_below` = s > 0, poses whose weight is below s times the largest are left out too. If
    :math:`|w_i| < s \max_j |w_j|` for the poses i left out, the gradient is off by at most
    :math:`s \max_j |w_j| \sum_i \lVert g_i \rVert`.
    """
    tape = _Tape(session, skip_below)
    for chunk in session.chunks(with_graph=False):
        tape.record(chunk.poses, chunk.predictions.detach(), chunk.moment)
        del chunk
    tape.close()

    def pullback(saved: Gradients, cotangents: Gradients) -> Gradients:
        (cotangent,) = cotangents
        if cotangent is None:
            return [None] * len(session.inputs.tensors)
        return tape.pull(cotangent)

    (per_pose,) = attach([tape.predictions], session.inputs, pullback)
    return Combined(rule(per_pose), per_pose)


@dataclass(frozen=True)
class _Take:
    """Poses to score together: numbers of all, and of those whose cotangent counts."""

    poses: list[int]
    counted: list[int]
    moment: Moment
    original: bool


class _Tape:
    """What the first pass leaves behind: poses, predictions and moments, no graph."""

    def __init__(self, session: Session, skip_below: float) -> None:
        self._session = session
        self._skip_below = skip_below
        self._poses: list[Pose] = []
        self._versions: list[list[int]] = []
        self._values: list[Tensor] = []
        self._chunks: list[tuple[range, Moment]] = []

    def record(self, poses: list[Pose], predictions: Tensor, moment: Moment) -> None:
        """Notes one chunk of the first pass."""
        self._chunks.append((range(len(self._poses), len(self._poses) + len(poses)), moment))
        self._poses += poses
        self._versions += [_versions(pose) for pose in poses]
        self._values.append(predictions)

    def close(self) -> None:
        """Ends the first pass."""
        self.predictions = group_predictions(self._values)  # [m, ...]
        self._values.clear()

    def pull(self, cotangent: Tensor) -> Gradients:
        """The vector-Jacobian product with a cotangent `[m, ...]`, by replaying poses."""
        cotangent = flush_denormals(cotangent)
        kept = self._worth_replaying(cotangent)
        self._check_unchanged(kept)
        total = GradientSum()
        queue = deque(self._takes(kept))
        with self._session.surroundings.restored(), torch.enable_grad():
            while queue:
                gradients = self._replay(queue[0], cotangent)
                take = queue.popleft()
                if gradients is None:  # not independent of its neighbours after all
                    queue += self._original_takes(take.counted)
                else:
                    total.add(gradients)
                del gradients
        if kept:
            self._session.check_differentiable()
        return total.delivered(self._session.inputs.tensors)

    def _worth_replaying(self, cotangent: Tensor) -> list[int]:
        size = cotangent.abs().flatten(1).amax(dim=1) if cotangent.ndim > 1 else cotangent.abs()
        skipped = size == 0
        if self._skip_below > 0:
            skipped |= size < self._skip_below * size.max()
        return (~skipped).nonzero().flatten().tolist()

    def _takes(self, kept: list[int]) -> list[_Take]:
        """How to score the kept poses again.

        A chunk that is coupled (random numbers, batch statistics) comes back whole. Poses of other
        chunks move together, if their chunks found the same buffers: a batched backward costs the
        same for a pose of weight zero.
        """
        moments = {i: moment for poses, moment in self._chunks for i in poses}
        takes = self._original_takes([i for i in kept if moments[i].coupled])
        free = (i for i in kept if not moments[i].coupled)
        size = self._session.scorer.chunk_size
        for _, alike in groupby(free, key=lambda i: id(moments[i].buffers)):
            for poses in in_chunks(alike, size):
                takes.append(_Take(poses, poses, moments[poses[0]], original=size == 1))
        return takes

    def _original_takes(self, counted: list[int]) -> list[_Take]:
        wanted = set(counted)
        return [
            _Take(list(poses), [i for i in poses if i in wanted], moment, original=True)
            for poses, moment in self._chunks
            if not wanted.isdisjoint(poses)
        ]

    def _replay(self, take: _Take, cotangent: Tensor) -> dict[int, Tensor] | None:
        """The gradients of one take, or None if it must be scored in its first composition."""
        with self._session.surroundings.at(take.moment):
            poses = [self._poses[i] for i in take.poses]
            predictions, leaves = self._session.score_again(poses, take.poses[0])
        expected = self.predictions[take.poses]
        if not _same(predictions.detach(), expected):
            if not take.original:
                return None
            raise ReplayError(_replay_message(take, expected, predictions.detach()))
        weights = torch.zeros_like(expected)
        at = [take.poses.index(i) for i in take.counted]
        weights[at] = cotangent[take.counted]
        return self._session.inputs.gradients(predictions, weights, leaves)

    def _check_unchanged(self, kept: list[int]) -> None:
        changed = [i for i in kept if _versions(self._poses[i]) != self._versions[i]]
        if changed:
            raise ReplayError(
                f"Tensors of pose(s) {', '.join(map(str, changed[:5]))} were modified in place "
                f"between combine() and backward().\n"
                f"Scored again, they would give other predictions.\n"
                f"Clone the poses before changing them, or use schedule='store'."
            )


def _versions(pose: Pose) -> list[int]:
    return [tensor._version for tensor in tensors_of(pose)]


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of another batch size or of atomic additions."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().clamp(min=1)
    return bool(((found - expected).abs() <= bound).all())


def _replay_message(take: _Take, expected: Tensor, found: Tensor) -> str:
    where = ", ".join(map(str, take.poses[:5])) + " and more" * (len(take.poses) > 5)
    return (
        f"Scored again in backward, pose(s) {where} gave {found.flatten()[:5].tolist()} instead of "
        f"{expected.flatten()[:5].tolist()}.\n"
        f"The model depends on something that neither its parameters, buffers, training flags, "
        f"autocast nor torch's random state hold: another random generator, a counter, a file.\n"
        f"Register such state as a buffer, draw from torch's generators, or use "
        f"schedule='stream', 'store' or 'retain', which score each pose once."
    )
