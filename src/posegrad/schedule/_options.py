"""How an engine runs poses."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad.errors import NoPosesError
from posegrad.model import Roster
from posegrad.ranks import Ranks
from posegrad.schedule._apart import Apart
from posegrad.schedule._batch import as_batch
from posegrad.schedule._chunks import ChunkSize, Portion, checked
from posegrad.schedule._division import Ahead, Division, Sliced, Walked
from posegrad.schedule._memory import Meter, checked_memory
from posegrad.schedule._poses import Pose, tensors_of
from posegrad.schedule._replay import accelerators
from posegrad.schedule._scorer import Scorer

__all__ = ["Options"]


@final
class Options:
    """How an engine runs poses: its arguments, and what it has learned since.

    Args:
        modules: The models.
        predict: Called as `predict(*modules, pose)`.
        collate: Joins poses into what `predict` takes.
        chunk_size: How many poses are joined.
        memory: The bytes that graphs may take together.
        ranks: The ranks that share every group of poses, if several do.
        roster: The parameters and submodules of the models.

    Attributes:
        is_wary: Whether to score all poses with graphs, as in the first group.
        apart: Checks that poses stay apart.

    Raises:
        ValueError: if `chunk_size` or `memory` is invalid.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        predict: Callable[..., Tensor] | None,
        collate: Callable[[list[Pose]], Any] | None,
        chunk_size: ChunkSize,
        memory: Any,
        ranks: Ranks | None,
        roster: Roster,
    ) -> None:
        self.modules = modules
        self.ranks = ranks
        self.roster = roster
        self.apart = Apart(modules, roster.named, roster.parts, self._tensors)
        self.memory = checked_memory(memory, modules)
        self.is_wary = True
        self._predict = predict
        self._collate = collate
        self._chunk_size = checked(chunk_size)
        self._meter = Meter(self.memory, self._tensors, on_cpu=not accelerators(modules))

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has spread the parameters over ranks."""
        return self.ranks is not None and self.ranks.sharded

    @property
    def stated_chunk(self) -> int:
        """How many poses are scored together, if the caller has said; else 1."""
        return self._chunk_size if isinstance(self._chunk_size, int) else 1

    def trust(self) -> None:
        """Notes that a group went through without an error, all poses scored with graphs."""
        self.is_wary = False

    def scorer(self) -> Scorer:
        """How poses are scored.

        Raises:
            ValueError: if there are several modules and no `predict`.
        """
        if self._predict is None and len(self.modules) > 1:
            raise ValueError(
                f"The engine has {len(self.modules)} modules and cannot know how a pose passes "
                f"through them.\nPass Engine(..., predict=lambda first, second, pose: ...). "
                f"Outputs that you hand to jacobian() or backward() need none."
            )
        return Scorer(self.modules, self._predict or nn.Module.__call__, self._collate)

    def division(
        self,
        poses: Iterable[Pose],
        parameters: Iterable[Tensor],
        *,
        may_be_empty: bool = False,
    ) -> Division:
        """How some poses are divided into chunks.

        Args:
            poses: As users state them.
            parameters: The models', as named by the roster.
            may_be_empty: Whether other ranks may have poses where this one has none.

        Raises:
            NoPosesError: if there are none.
            ValueError: if they must be joined and there is no `collate`.
        """
        division = self._division(poses, parameters)
        if division.is_empty and not may_be_empty:
            raise NoPosesError(
                "There are no poses: a combination of none is undefined.\n"
                "Leave compounds without poses out of the loop. A generator that was used once is "
                "empty: make a list of it."
            )
        return division

    def portions(
        self,
        division: Division,
        *,
        light: bool = False,
        whole: bool = False,
        reserved: float = 0.0,
    ) -> Iterator[Portion]:
        """The poses of a call, forward by forward, as `Division.portions`.

        Raises:
            PosesMixError: once the first of several poses has been scored, if poses mix.
        """
        chunks = division.portions(light=light, whole=whole, reserved=reserved)
        looked = (torch.is_grad_enabled(), False) in division.known.apart
        settled = division.walked or (looked and isinstance(division, Sliced))
        if division.is_stated or self.is_sharded or settled:
            return chunks
        return self.apart.shown(chunks, division.known, self.scorer())

    def _division(self, poses: Iterable[Pose], parameters: Iterable[Tensor]) -> Division:
        batch, size = as_batch(poses), self._chunk_size
        if batch is not None:
            known = self._meter.of(self._kind(batch.poses, "slice", parameters))
            return Sliced(batch, size, known, measures=not self.is_sharded)
        joins = self._collate is not None or size not in _ALONE
        ahead = Ahead(poses)
        known = self._meter.of(self._kind(ahead.first, "joined" if joins else "alone", parameters))
        return Walked(ahead, size, known, joins=joins)

    def _kind(self, pose: Pose, how: str, parameters: Iterable[Tensor]) -> Hashable:
        """What poses have in common whose graphs differ only in size."""
        kinds = tuple([(t.dtype, t.ndim, t.requires_grad) for t in tensors_of(pose)])
        trained = tuple([p.requires_grad for p in parameters])
        parts = tuple([part.training for part in self.roster.parts()])
        return type(pose), how, kinds, parts, trained, torch.is_autocast_enabled("cpu")

    def _tensors(self) -> Iterator[Tensor]:
        return (t for m in self.modules for t in (*m.parameters(), *m.buffers()))


_ALONE = (1, "auto")  # chunk sizes under which walked poses come one by one
