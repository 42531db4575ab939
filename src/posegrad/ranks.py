"""The processes that share a group of poses, and what they tell each other.

Every call goes through the same three steps on every rank: work on one's own, tell the others how
it went, go on together or not at all. So a rank whose model raises does not leave the others
waiting: they raise too, and name it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Self, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from posegrad.errors import RankError, listed

__all__ = ["Ranks", "shown"]

T = TypeVar("T")

BUCKET = 25 * 2**20  # bytes that travel in one message, as many as DistributedDataParallel sends


_CALLS: defaultdict[str, Iterator[int]] = defaultdict(count)
"""Counts the steps that this process has come to, in each process group."""

_CALLS_AGREED: defaultdict[str, int] = defaultdict(int)
"""The number of the last call that the ranks of a process group made together."""

_NOT_WRITTEN = "Nothing was added to any .grad."
_WRITTEN = "Sharded parameters may have the gradients of some poses already: call zero_grad()."

_SAME_ORDER = (
    "All ranks of a process group must call combine(), backward() and the products of a shared "
    "Jacobian in the same order, a rank without poses too."
)


@final
class _Told(NamedTuple):
    """What one rank tells the others: which step it is at, and its result or its failure."""

    step: str
    value: Any
    failure: str | None


@final
class Fingerprint:
    """Tells in a few characters whether ranks that sum gradients have the same parameters.

    In every call, it covers the names, shapes and dtypes of the trained ones. In an engine's first
    call, it also covers the values of all, to the last bit, which takes a pass over them.
    """

    def __init__(self) -> None:
        self._first = True

    def of(self, named: Iterable[tuple[str, Tensor]]) -> str:
        """The fingerprint of some parameters."""
        held = list(named)
        trained = [(name, tuple(p.shape), str(p.dtype)) for name, p in held if p.requires_grad]
        values = [_byte_sum(p) for _, p in held] if self._first else []
        return f"{len(trained)} tensors, names and shapes {_digest(trained)}" + (
            f", values {_digest(values)}" if values else ""
        )

    def agreed(self) -> None:
        """Notes that all ranks have found the same."""
        self._first = False


def shown(rule: object) -> str:
    """A rule and its settings in one line, the same in every process that made it alike."""
    return " ".join(re.sub(r" at 0x\w+", "", repr(rule)).split())


def _byte_sum(parameter: Tensor) -> int:
    """The sum of a parameter's bytes, the same in any order; 0 for a sharded one."""
    if hasattr(parameter, "device_mesh"):
        return 0
    return int(parameter.detach().reshape(-1).contiguous().view(torch.uint8).sum())


def _digest(found: object) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()[:8]


@final
@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group.

    Args:
        group: A `torch.distributed` process group that this process is a member of.
        sharded: Whether FSDP2 has spread the parameters over them.
        call: The number of the call that they make, if they have agreed on one: steps of different
            calls are different steps.
        fingerprint: Compares the parameters whose gradients they sum.
    """

    group: Any
    sharded: bool = False
    call: int | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    @property
    def own(self) -> int:
        """The number of this one within the group."""
        return dist.get_rank(self.group)

    def next_call(self) -> int:
        """The number that this rank would give the next call."""
        return _CALLS_AGREED[self.group.group_name] + 1

    def in_call(self, numbers: Iterable[int]) -> Self:
        """The ranks in a call, given the number that each would give it; from now on they agree."""
        number = max(numbers)
        self.fingerprint.agreed()
        _CALLS_AGREED[self.group.group_name] = number
        return replace(self, call=number)

    def together(self, step: str, work: Callable[[], T]) -> list[T]:
        """Does this rank's part of a step; returns the results of all ranks, in their order.

        Args:
            step: What is done, the same on every rank.
            work: This rank's part. Its result is pickled: small things only.

        Raises:
            RankError: if another rank failed, is at another step, or did not come in time.
            Exception: what `work` raises, once the others know.
        """
        if self.call is not None:
            step = f"{step} of call {self.call}"
        failure: Exception | None = None
        told = _Told(step, None, None)
        try:
            told = _Told(step, work(), None)
        except Exception as error:
            if isinstance(error, RankError) and error.known_at == step:
                raise  # the others are past this step
            failure = error
            told = _Told(step, None, f"{type(error).__name__}: {error}")
        everyone = self._exchanged(told)
        failed = [(i, one.failure) for i, one in enumerate(everyone) if one.failure is not None]
        if failure is not None:
            others = [f"rank {i}: {text}" for i, text in failed if i != self.own]
            if others:
                failure.add_note(f"Others failed at the step {step!r} too: {listed(others)}.")
            raise failure
        if failed:
            stopped = RankError(_failed_message(step, self.own, failed, self.sharded))
            stopped.known_at = everyone[failed[0][0]].step  # perhaps a step around this one
            raise stopped
        elsewhere = [(i, one.step) for i, one in enumerate(everyone) if one.step != step]
        if elsewhere:
            raise RankError(_elsewhere_message(step, self.own, elsewhere))
        return [one.value for one in everyone]

    def sum(
        self,
        gradients: list[Tensor | None],
        has: Sequence[Sequence[bool]],
        like: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The sums over ranks of some gradients, bucket by bucket.

        Args:
            gradients: In the same order on every rank; they are dropped from the list as they are
                sent. None counts as zeros, unless it is None everywhere; then so is the sum.
            has: Rank by rank, which of them are not None.
            like: What they are gradients of, with the shapes, dtypes and devices of the sums.

        Memory: the sums, and one bucket. Half precisions are summed in float32.
        """
        used = [i for i in range(len(gradients)) if any(each[i] for each in has)]
        sums: list[Tensor | None] = [None] * len(gradients)
        for bucket in _buckets(used, like):
            pieces = [_flat(gradients[i], like[i]) for i in bucket]
            sizes = [len(piece) for piece in pieces]
            joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone()
            del pieces
            for i in bucket:
                gradients[i] = None
            dist.all_reduce(joined, group=self.group)
            for i, flat in zip(bucket, torch.split(joined, sizes), strict=True):
                alone = len(bucket) == 1  # else the sums would share one storage
                sums[i] = flat.to(like[i].dtype, copy=not alone).view(like[i].shape)
        return sums

    def added(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place, of a tensor that has the same shape on all of them."""
        dist.all_reduce(values, group=self.group)
        return values

    def sent(self, value: T, to: int) -> list[T]:
        """Sends what each rank has to one: there in the order of ranks, elsewhere an empty list."""
        mine = self.own == to
        everyone: list[Any] | None = [None] * self.count if mine else None
        dist.gather_object(value, everyone, group=self.group, group_dst=to)
        return everyone or []

    def shared(self, value: T | None, of: int) -> T:
        """Sends what one of the ranks has to all of them."""
        held: list[Any] = [value]
        dist.broadcast_object_list(held, group=self.group, group_src=of)
        found: T = held[0]
        return found

    def _exchanged(self, told: _Told) -> list[_Told]:
        everyone: list[Any] = [None] * self.count
        call = next(_CALLS[self.group.group_name])
        try:
            self.group.get_group_store().set(_key(self.own), f"{call} {told.step}")
            dist.all_gather_object(everyone, told, group=self.group)
        except RuntimeError as error:
            seen = [self._last_seen(i) for i in range(self.count)]
            late = [f"rank {i}, {step}" for i, (n, step) in enumerate(seen) if n < call]
            raise RankError(
                f"Rank {self.own} waited in vain at the step {told.step!r} for "
                f"{listed(late) or 'others, which have failed since'}.\n{_SAME_ORDER}\n"
                f"The process group gave up: {error}"
            ) from error
        return everyone

    def _last_seen(self, rank: int) -> tuple[int, str]:
        """The number of the last step that a rank came to, and what it was."""
        store, key = self.group.get_group_store(), _key(rank)
        try:
            if not store.check([key]):
                return -1, "not seen yet"
            call, _, step = store.get(key).decode().partition(" ")
        except RuntimeError:  # who keeps the store is gone
            return -1, "last step unknown"
        return int(call), f"last seen at {step!r}"


def _key(rank: int) -> str:
    return f"posegrad/{rank}"


def _buckets(used: Sequence[int], like: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors that travel together: of one kind, and up to `BUCKET` bytes."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i in used:
        kinds.setdefault((like[i].device, _wide(like[i].dtype)), []).append(i)
    for (_, dtype), numbers in kinds.items():
        bucket: list[int] = []
        size = 0
        for i in numbers:
            size += like[i].numel() * dtype.itemsize
            if bucket and size > BUCKET:
                yield bucket
                bucket, size = [], like[i].numel() * dtype.itemsize
            bucket.append(i)
        yield bucket


def _flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    dtype = _wide(like.dtype)
    if gradient is None:
        return torch.zeros(like.numel(), dtype=dtype, device=like.device)
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.to(dtype).reshape(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _failed_message(step: str, own: int, failed: Sequence[tuple[int, str]], sharded: bool) -> str:
    what = "\n".join(f"Rank {i}: {failure}" for i, failure in failed)
    return (
        f"Rank {own} stops at the step {step!r}, since others failed there.\n{what}\n"
        f"{_WRITTEN if sharded else _NOT_WRITTEN} Fix what they report."
    )


def _elsewhere_message(step: str, own: int, elsewhere: Sequence[tuple[int, str]]) -> str:
    others = listed([f"rank {i} at {step!r}" for i, step in elsewhere])
    return f"Rank {own} is at the step {step!r}, {others}.\n{_SAME_ORDER}"
