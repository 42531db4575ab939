"""A model's buffers: the values each chunk found, and how a replay gets them back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from posegrad._restoring import Change
from posegrad._torch import tables_of, version_of
from posegrad.errors import ReplayError, listed

__all__ = ["Buffers", "Values"]

Place = tuple[nn.Module, str]
"""Where a buffer lives: its module and its name there."""

Values = Mapping[Place, Tensor | None]
"""The buffers of a model, or copies of them; None for one that is not set yet."""


@final
class Buffers:
    """The buffers of some modules, from the first chunk on. Costs one copy of them.

    Writing a buffer changes its version, except through `.data` or in batch norm's running
    statistics. Buffers of modules in training are therefore compared by value after every chunk,
    whatever their size. In evaluation, that could take longer than a small model itself: all are
    compared by value after the first chunk and after the last, and in between only those that the
    first was seen to write.

    Args:
        training: Whether each module is in training.

    Attributes:
        values: Copies of all buffers as last noted. Replaced, never written to.
    """

    def __init__(self, training: Mapping[nn.Module, bool]) -> None:
        self._training = dict(training)
        own = zip(training, tables_of(training), strict=True)
        self._holders = [module for module, (*_, buffers) in own if buffers]
        self._seen = self._own()
        self.values: Values = _copied(self._seen)
        self._marks = _marked(self._seen)
        self._mutable: set[Place] = set()
        self._silent: set[Place] = set()  # written without a new version in the first chunk
        self._has_run = False

    def note_changes(self) -> None:
        """Notes the values that the last chunk changed."""
        own = self._own()
        marks = _marked(own)
        changed = {place for place in own if marks[place] != self._marks.get(place)}
        compared = {place for place in own if place not in changed and self._is_compared(place)}
        silent = self._unlike({place: own[place] for place in compared})
        self._silent |= silent
        self._has_run = True
        changed |= silent
        if changed:
            changed = _with_aliases(changed, own)
            self.values = {**self.values, **_copied({place: own[place] for place in changed})}
            self._seen, self._marks = own, marks
            self._mutable |= changed

    @property
    def has_changed(self) -> bool:
        """Whether any chunk wrote to a buffer."""
        return bool(self._mutable)

    def rewind(self) -> None:
        """Undoes what was written since the last note."""
        Kept(self._seen, self.values).put_back()

    def check_none_missed(self) -> None:
        """Ends the first pass: checks that no write was missed.

        Raises:
            ReplayError: if a buffer was written whose earlier values were not noted.
        """
        missed = [name for _, name in self._unlike(self._own())]
        if missed:
            raise ReplayError(
                f"Buffer(s) {listed(missed)} of modules in evaluation were written without a new "
                f"version (through .data), and not yet while the first poses were scored.\n"
                f"So nobody noted their values before each pose, and a replay would find others.\n"
                f"Write them in place under torch.no_grad() instead of through .data, or use "
                f"schedule='stream', 'store' or 'retain', which score each pose once."
            )

    def kept(self) -> "Kept":
        """The buffers as they are now, before replays."""
        own = self._own()
        since = _with_aliases(self._unlike(own), own)  # the user wrote them
        self._mutable |= since
        return Kept(own, {**self.values, **_copied({place: own[place] for place in since})})

    def exchanged(self, values: Values) -> Change:
        """A chunk's values in place; afterwards the model has its own buffers back.

        Buffers are exchanged, not overwritten, so the user's tensors and graphs that saved them
        keep their values. Only buffers that were written, by a chunk or since, are exchanged.
        """
        own = self._own()
        stale = [place for place in values if place in self._mutable and place in own]
        return _Exchanged(own, _copied({place: values[place] for place in stale}))

    def _own(self) -> dict[Place, Tensor | None]:
        own = zip(self._holders, tables_of(self._holders), strict=True)
        return {(m, name): b for m, (*_, buffers) in own for name, b in buffers.items()}

    def _is_compared(self, place: Place) -> bool:
        """Whether to compare a buffer by value after the chunk that just ran."""
        return not self._has_run or self._training[place[0]] or place in self._silent

    def _unlike(self, buffers: Values) -> set[Place]:
        """The places whose values differ from the last note."""
        return {
            place
            for place, buffer in buffers.items()
            if place in self.values and not _same(buffer, self.values[place])
        }


@final
class Kept:
    """Buffers and their values before replays.

    Args:
        own: The tensors.
        values: Their values.
    """

    def __init__(self, own: Values, values: Values) -> None:
        self._own = own
        self._values = values

    def put_back(self) -> None:
        """Undoes what replays wrote to buffers that were not exchanged, or put in their places.

        A model may write to a buffer that no chunk of the first pass wrote, or reach one by a name
        that is not registered.
        """
        for (module, name), buffer in self._own.items():
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            value = self._values.get((module, name))
            if buffer is not None and value is not None and not _same(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@final
class _Exchanged(Change):
    """Other buffers in place of a model's own."""

    def __init__(self, own: Values, others: Values) -> None:
        self._own = own
        self._others = others

    def make(self) -> None:
        for (module, name), value in self._others.items():
            setattr(module, name, value)

    def undo(self) -> None:
        for module, name in self._others:
            setattr(module, name, self._own[module, name])


def _copied(buffers: Values) -> dict[Place, Tensor | None]:
    """A copy of every buffer. Shared buffers stay shared, and views of one stay views of one."""
    distinct = {id(buffer): buffer for buffer in buffers.values() if buffer is not None}
    copies: dict[int, Tensor] = {}
    for group in _aliases(distinct.values()):
        if len(group) == 1:
            copies[id(group[0])] = group[0].detach().clone()
            continue
        memory = group[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
        for view in group:
            empty = torch.empty(0, dtype=view.dtype, device=view.device)
            empty.set_(memory, view.storage_offset(), view.size(), view.stride())
            copies[id(view)] = empty
    return {place: None if b is None else copies[id(b)] for place, b in buffers.items()}


def _aliases(buffers: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups of tensors that share memory."""
    groups: dict[object, list[Tensor]] = {}
    for buffer in buffers:
        plain = buffer.layout == torch.strided and not (buffer.is_nested or buffer.is_meta)
        place = buffer.untyped_storage().data_ptr() if plain else 0
        groups.setdefault((buffer.device, place) if place else id(buffer), []).append(buffer)
    return list(groups.values())


def _with_aliases(places: set[Place], own: Values) -> set[Place]:
    """The places, and those of all buffers that share memory with a buffer there."""
    if not places:
        return places
    distinct = {id(buffer): buffer for buffer in own.values() if buffer is not None}
    changed = {id(own[place]) for place in places}
    for group in _aliases(distinct.values()):
        members = {id(buffer) for buffer in group}
        if members & changed:
            changed |= members
    return places | {place for place, buffer in own.items() if id(buffer) in changed}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else _same_value(a, b)


def _same_value(a: Tensor, b: Tensor) -> bool:
    kinds = [(t.dtype, t.device, t.layout, t.is_nested) for t in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    if a.is_meta:
        return a.shape == b.shape
    if a.layout == torch.strided and not a.is_nested:  # nearly always
        return _equal(a, b)
    parts = _parts(a), _parts(b)
    return len(parts[0]) == len(parts[1]) and all(map(_equal, *parts))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal; nan equals nan of the same bits."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and not a.is_quantized and torch.equal(_bits(a), _bits(b))


def _bits(buffer: Tensor) -> Tensor:
    return buffer.resolve_conj().reshape(-1).contiguous().view(torch.uint8)


def _parts(buffer: Tensor) -> Sequence[Tensor]:
    """The plain tensors that make up a nested or sparse one."""
    if buffer.is_nested:
        return buffer.unbind()
    if buffer.layout == torch.sparse_coo:
        buffer = buffer.coalesce()
        return buffer.indices(), buffer.values()
    if buffer.layout in (torch.sparse_csr, torch.sparse_bsr):
        return buffer.crow_indices(), buffer.col_indices(), buffer.values()
    if buffer.layout in (torch.sparse_csc, torch.sparse_bsc):
        return buffer.ccol_indices(), buffer.row_indices(), buffer.values()
    return (buffer.to_dense(),)


def _marked(buffers: Values) -> dict[Place, tuple[int, int]]:
    """Identity and version of each buffer; callers keep the buffers alive, so ids stay unique."""
    return {place: _mark(buffer) for place, buffer in buffers.items()}


def _mark(buffer: Tensor | None) -> tuple[int, int]:
    return id(buffer), 0 if buffer is None or buffer.is_inference() else version_of(buffer)
