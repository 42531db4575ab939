"""Scoring a pose again exactly as it was scored before.

A forward depends on more than its arguments: on random state, on buffers, on which modules are in
training, on autocast, on the default device. `Surroundings` writes down what it was; a `Moment` is
the part that changes from chunk to chunk. Random state (5 kB on a CPU) and buffers are kept once
for all chunks that found them alike. Without this, a replay under dropout would be 110 % wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from posegrad._restoring import Change
from posegrad.errors import ReplayError, listed

__all__ = ["Moment", "Surroundings", "has_other_kernels", "scales_float16"]

Place = tuple[nn.Module, str]
"""Where a buffer lives: its module and its name there."""


@dataclass(frozen=True)
class Moment:
    """What the forward of one chunk found, beyond its arguments and the parameters.

    Args:
        random: The random state of every device before it. Whether it drew cannot be told: a model
            may put the state back itself, as `torch.random.fork_rng` does.
        buffers: The values of the model's buffers before it.
    """

    random: list[Tensor]
    buffers: Mapping[Place, Tensor]


class Surroundings:
    """What a model's forward depends on besides arguments and parameters.

    Made when the first pass begins. Costs one copy of the model's buffers.

    A buffer that is written gets a new version, except by batch norm, which so moves its running
    statistics, and through `.data`. Those of modules in training are therefore compared by value
    after every chunk, whatever their size. In evaluation, where that could take longer than a small
    model, all are compared by value after the first chunk and after the last; in between only those
    that the first was seen to write.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._training = {m: m.training for module in modules for m in module.modules()}
        self._devices = _accelerators(modules)
        self._autocast = _autocast_state(self._devices)
        self._default_device = torch.get_default_device()
        self._holders = [
            m for m in self._training if next(m.buffers(recurse=False), None) is not None
        ]
        self._buffers_seen = self._buffers()
        self._values = _copied(self._buffers_seen)
        self._marks = _marked(self._buffers_seen)
        self._mutable: set[Place] = set()
        self._random: list[Tensor] = []
        self._silent: set[Place] = set()  # written without a new version in the first chunk
        self._has_run = False

    @property
    def on_cpu(self) -> bool:
        """Whether no part of the models is on an accelerator."""
        return not self._devices

    def random_state(self) -> list[Tensor]:
        """The random state of the CPU and of every accelerator the model is on."""
        modules = [torch.get_device_module(device) for device in self._devices]
        states = [m.get_rng_state(d) for m, d in zip(modules, self._devices, strict=True)]
        return [torch.get_rng_state(), *states]

    def moment_since(self, random: list[Tensor]) -> Moment:
        """What the chunk that just ran had found, given the random state before it."""
        found = self._values
        if not (self._random and all(map(torch.equal, random, self._random))):
            self._random = random
        self._note_changed_buffers()
        return Moment(self._random, buffers=found)

    def restored(self) -> Change:
        """Flags, autocast and default device as in the first pass; afterwards nothing has changed.

        The global random state is put back too, whatever the replays draw. The backward of a model
        on an accelerator runs on a thread of its own, which knows nothing of what was set here.
        """
        random = self.random_state()
        self._mutable.update(self._unlike(self._buffers()))  # somebody wrote them since
        return _Restored(
            self._training,
            self._autocast,
            self._default_device,
            lambda: self._set_random_state(random),
        )

    def at(self, moment: Moment) -> Change:
        """One chunk's random state and buffers; afterwards the model has its own buffers back.

        Buffers are exchanged, not overwritten: the user's tensors, and graphs that saved them, see
        nothing. Only those that some chunk wrote, or somebody since, are.
        """
        self._set_random_state(moment.random)
        own = self._buffers()
        stale = [place for place in moment.buffers if place in own and place in self._mutable]
        return _Exchanged(own, _copied({place: moment.buffers[place] for place in stale}))

    def _buffers(self) -> dict[Place, Tensor]:
        return {
            (module, name): buffer
            for module in self._holders
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        }

    def check_none_missed(self) -> None:
        """Ends the first pass.

        Raises:
            ReplayError: if a buffer was written that no chunk's moment has the values of.
        """
        missed = [name for _, name in self._unlike(self._buffers())]
        if missed:
            raise ReplayError(
                f"Buffer(s) {listed(missed)} of modules in evaluation were written without a new "
                f"version (through .data), and not yet while the first poses were scored.\n"
                f"So nobody noted their values before each pose, and a replay would find others.\n"
                f"Write them in place under torch.no_grad() instead of through .data, or use "
                f"schedule='stream', 'store' or 'retain', which score each pose once."
            )

    def _note_changed_buffers(self) -> None:
        """Copies the buffers that changed since they were last noted."""
        buffers = self._buffers()
        marks = _marked(buffers)
        changed = {p: b for p, b in buffers.items() if marks[p] != self._marks.get(p)}
        silent = self._unlike(
            {p: b for p, b in buffers.items() if p not in changed and self._is_compared(p)}
        )
        self._silent.update(silent)
        self._has_run = True
        changed |= silent
        if changed:
            self._values = {**self._values, **_copied(changed)}
            self._buffers_seen, self._marks = buffers, marks
            self._mutable.update(changed)

    def _is_compared(self, place: Place) -> bool:
        """Whether to compare a buffer by value after the chunk that just ran."""
        return not self._has_run or self._training[place[0]] or place in self._silent

    def _unlike(self, buffers: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        """Those whose values are not the ones noted last."""
        return {
            place: buffer
            for place, buffer in buffers.items()
            if place in self._values and not _same_value(buffer, self._values[place])
        }

    def _set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


@final
class _Restored(Change):
    """Training flags, autocast and default device as they were when poses were scored."""

    def __init__(
        self,
        training: Mapping[nn.Module, bool],
        autocast: Sequence[dict[str, Any]],
        device: torch.device,
        put_random_back: Callable[[], None],
    ) -> None:
        self._training = training
        self._autocast = autocast
        self._device = device
        self._put_random_back = put_random_back
        self._now = {m: m.training for m in training}
        self._stack = ExitStack()

    def make(self) -> None:
        for arguments in self._autocast:
            self._stack.enter_context(torch.autocast(**arguments))
        if torch.get_default_device() != self._device:
            self._stack.enter_context(self._device)
        _set_training(self._training)

    def undo(self) -> None:
        _set_training(self._now)
        self._put_random_back()
        self._stack.close()  # what it has left if it is cut short is put back at the door


@final
class _Exchanged(Change):
    """Other buffers in the places of a model's own."""

    def __init__(self, own: Mapping[Place, Tensor], others: Mapping[Place, Tensor]) -> None:
        self._own = own
        self._others = others

    def make(self) -> None:
        for (module, name), value in self._others.items():
            setattr(module, name, value)

    def undo(self) -> None:
        for module, name in self._others:
            setattr(module, name, self._own[module, name])


def _accelerators(modules: Sequence[nn.Module]) -> list[torch.device]:
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)


def _autocast_state(devices: Sequence[torch.device]) -> list[dict[str, Any]]:
    """The arguments of torch.autocast that restore today's state, one for each kind of device."""
    return [
        {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted({"cpu", *(device.type for device in devices)})
    ]


def has_other_kernels(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward under no_grad takes kernels whose results differ in the last bits.

    oneDNN's LSTM on a CPU does, in float32, and nothing but a graph makes it take the others.
    """
    parts = (part for module in modules for part in module.modules())
    weights = (p for part in parts if isinstance(part, nn.LSTM) for p in part.parameters())
    return any(p.device.type == "cpu" and p.dtype == torch.float32 for p in weights)


def scales_float16(modules: Sequence[nn.Module]) -> bool:
    """Whether gradients would pass through float16, which needs a scaled loss first."""
    states = _autocast_state(_accelerators(modules))
    if any(state["enabled"] and state["dtype"] == torch.float16 for state in states):
        return True
    return any(p.dtype == torch.float16 for module in modules for p in module.parameters())


def _copied(buffers: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """A copy of every buffer; one that two modules share stays one."""
    copies = {id(buffer): buffer.detach().clone() for buffer in buffers.values()}
    return {place: copies[id(buffer)] for place, buffer in buffers.items()}


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
    """Of the same values, where nan is one: that is told by its bits."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and not a.is_quantized and torch.equal(_bits(a), _bits(b))


def _bits(buffer: Tensor) -> Tensor:
    return buffer.resolve_conj().reshape(-1).contiguous().view(torch.uint8)


def _parts(buffer: Tensor) -> Sequence[Tensor]:
    """Plain tensors that hold what a nested or sparse one is made of."""
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


def _marked(buffers: Mapping[Place, Tensor]) -> dict[Place, tuple[int, int]]:
    """A buffer's identity and version; the buffers are kept alive, so that an id stays theirs."""
    return {place: _mark(buffer) for place, buffer in buffers.items()}


def _mark(buffer: Tensor) -> tuple[int, int]:
    return id(buffer), 0 if buffer.is_inference() else buffer._version


def _set_training(flags: Mapping[nn.Module, bool]) -> None:
    for module, training in flags.items():
        module.training = training
