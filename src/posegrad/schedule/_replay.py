"""Scoring a pose again exactly as it was scored before.

A forward depends on more than its arguments: on random state, buffers, training flags, autocast,
the default device. `Surroundings` records these; a `Moment` is the part that changes from chunk
to chunk. Random state (5 kB on a CPU) and buffers are kept once for all chunks that found the
same. Without this, a replay under dropout would be 110 % wrong.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from posegrad._restoring import Change, no_graph
from posegrad._torch import tables_of
from posegrad.schedule._buffers import Buffers, Values

__all__ = [
    "Moment",
    "Start",
    "Surroundings",
    "accelerators",
    "has_other_kernels",
    "scales_float16",
    "without_graph",
]


@final
@dataclass(frozen=True)
class Moment:
    """What the forward of one chunk found, besides its arguments and the parameters.

    Args:
        random: The random state of every device before the forward. Whether the forward drew
            cannot be told: a model may put the state back itself, as `torch.random.fork_rng` does.
        buffers: The values of the model's buffers before the forward.
    """

    random: list[Tensor]
    buffers: Values


@final
class Surroundings:
    """What a model's forward depends on, besides arguments and parameters.

    Made when the first pass begins. Costs one copy of the model's buffers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._training = {m: m.training for module in modules for m in module.modules()}
        self._devices = accelerators(modules)
        self._autocast = _autocast_state(self._devices)
        self._default_device = torch.get_default_device()
        self.buffers = Buffers(self._training)
        self._random: list[Tensor] = []

    @property
    def on_cpu(self) -> bool:
        """Whether all of the models is on the CPU."""
        return not self._devices

    def random_state(self) -> list[Tensor]:
        """The random state of the CPU and of every accelerator the model is on."""
        modules = [torch.get_device_module(device) for device in self._devices]
        states = [m.get_rng_state(d) for m, d in zip(modules, self._devices, strict=True)]
        return [torch.get_rng_state(), *states]

    def moment_since(self, drawn: list[Tensor]) -> Moment:
        """What the chunk that just ran had found, given the random state before it."""
        found = self.buffers.values
        if not (self._random and all(map(torch.equal, drawn, self._random))):
            self._random = drawn
        self.buffers.note_changes()
        return Moment(self._random, buffers=found)

    def restored(self) -> Change:
        """Restores flags, autocast and default device of the first pass; afterwards undoes it.

        The global random states are put back too, including Python's and NumPy's, whatever replays
        draw. Covers only this thread; the backward of a model on an accelerator runs on another.
        """
        drawn, buffers = self.random_state(), self.buffers.kept()
        of_python, of_numpy = random.getstate(), np.random.get_state()

        def put_back() -> None:
            self._set_random_state(drawn)
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            buffers.put_back()

        return _Restored(self._training, self._autocast, self._default_device, put_back)

    def at(self, moment: Moment) -> Change:
        """Restores a chunk's random state and buffers; afterwards the model has its own again."""
        self._set_random_state(moment.random)
        return self.buffers.exchanged(moment.buffers)

    def rewind(self, random: Sequence[Tensor]) -> None:
        """Undoes what an interrupted forward drew and wrote to buffers."""
        self._set_random_state(random)
        self.buffers.rewind()

    def _set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


@final
class Start:
    """Random state and buffers before forwards that may have to be undone.

    Args:
        parameters: The parameters; the random state of their devices is noted.
        parts: All modules of the models.
    """

    def __init__(self, parameters: Iterable[Tensor], parts: Sequence[nn.Module]) -> None:
        devices = {p.device for p in parameters}
        self._devices = [d for d in devices if d.type not in ("cpu", "meta")]
        self._random = torch.get_rng_state()
        modules = [torch.get_device_module(device) for device in self._devices]
        pairs = zip(modules, self._devices, strict=True)
        self._states = [module.get_rng_state(device) for module, device in pairs]
        self._buffers = [
            (part, name, buffer, None if buffer is None else buffer.detach().clone())
            for part, (*_, own) in zip(parts, tables_of(parts), strict=True)
            for name, buffer in own.items()
        ]

    def put_back(self) -> None:
        """Restores both."""
        torch.set_rng_state(self._random)
        for device, state in zip(self._devices, self._states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        with torch.no_grad():
            for part, name, buffer, value in self._buffers:
                setattr(part, name, buffer)  # a forward may have put another one there
                if buffer is not None and value is not None:
                    buffer.copy_(value)


@final
class _Restored(Change):
    """Training flags, autocast and default device as when poses were scored."""

    def __init__(
        self,
        training: Mapping[nn.Module, bool],
        autocast: Sequence[dict[str, Any]],
        device: torch.device,
        put_back: Callable[[], None],
    ) -> None:
        self._training = training
        self._autocast = autocast
        self._device = device
        self._put_back = put_back
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
        self._put_back()
        self._stack.close()  # if interrupted, the rest is put back on leaving


@final
class without_graph(Change):  # noqa: N801
    """Scoring that will be replayed: no graph, but the kernels of a forward with one."""

    def __init__(self) -> None:
        self._fast = torch.backends.mha.get_fastpath_enabled()

    def make(self) -> None:
        torch.backends.mha.set_fastpath_enabled(False)  # its results differ in the last bits
        no_graph().__enter__()

    def undo(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        torch.clear_autocast_cache()  # casts made here carry no gradient


def accelerators(modules: Sequence[nn.Module]) -> list[torch.device]:
    """The devices, other than the CPU, that hold parameters or buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)


def _autocast_state(devices: Sequence[torch.device]) -> list[dict[str, Any]]:
    """The arguments of torch.autocast that restore today's state, for each kind of device."""
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
    """Whether a forward under no_grad uses kernels whose results differ in the last bits.

    oneDNN's LSTM on a CPU does, in float32; only a graph makes it use the others.
    """
    parts = (part for module in modules for part in module.modules())
    weights = (p for part in parts if isinstance(part, nn.LSTM) for p in part.parameters())
    return any(p.device.type == "cpu" and p.dtype == torch.float32 for p in weights)


def scales_float16(parts: Sequence[nn.Module]) -> bool:
    """Whether gradients would pass through float16 and so need a scaled loss first.

    Args:
        parts: All modules of the models, submodules included.
    """
    tables = tables_of(parts)
    parameters = [p for own, *_ in tables for p in own.values() if p is not None]
    buffers = [b for *_, own in tables for b in own.values() if b is not None]
    kinds = {"cpu", *(tensor.device.type for tensor in (*parameters, *buffers))} - {"meta"}
    casts = (kind for kind in kinds if torch.is_autocast_enabled(kind))
    if any(torch.get_autocast_dtype(kind) == torch.float16 for kind in casts):
        return True
    return any(p.dtype == torch.float16 for p in parameters)


def _set_training(flags: Mapping[nn.Module, bool]) -> None:
    for module, training in flags.items():
        module.training = training
